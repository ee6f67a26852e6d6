# A fleet from end to end: a hub that publishes, and hosts of three kinds that fetch, deploy and report.
let
  keys = import ./fleet-keys.nix;
  host = name: {
    services.ekiben.fleet = {
      enable = true;
      hub = {
        host = "hub";
        hostKey = keys.hub.public;
      };
      identityFile = "/root/identity";
      signers = [ keys.signer.public ];
      dates = null;
    };
    environment.etc."scenario/identity".text = keys.${name}.private;
  };
in
{
  # the hosts' systems are stand-ins, which only namespace hosts have
  onlyHosts = true;
  nodes.hub = {
    services.ekiben.hub = {
      enable = true;
      user = "deploy";
      repository = "/srv/fleet";
      hosts.web.publicKey = keys.web.public;
      hosts.db.publicKey = keys.db.public;
      hosts.plain.publicKey = keys.plain.public;
    };
    systemd.tmpfiles.rules = [ "d /srv/fleet 0755 deploy users -" ];
    environment.etc = {
      "scenario/host-key".text = keys.hub.private;
      "scenario/signer".text = keys.signer.private;
    };
  };
  # a flake of its own
  nodes.web = {
    imports = [ (host "web") ];
    services.ekiben.fleet = {
      selfUpdate.enable = true;
      reboot = {
        when = "needed";
        window = { };
        kexec = true;
      };
    };
    # may update the machine, and see how it goes
    users.users.alice = {
      isNormalUser = true;
      uid = 1001;
      extraGroups = [
        "ekiben"
        "systemd-journal"
      ];
    };
  };
  # one of several of a flake
  nodes.db = host "db";
  # no flake
  nodes.plain =
    { lib, ... }:
    {
      imports = [ (host "plain") ];
      systemd.services.ekiben-fleet.environment.NIX_PATH = lib.mkForce "nixpkgs=/srv/nixpkgs";
    };
}
