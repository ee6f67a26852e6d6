# What the machines of a fleet are, unless it is what a scenario is about.
let
  keys = import ./fleet-keys.nix;
in
{
  # the hub of the hosts of these names: publishes for them from /srv/fleet
  hub = names: {
    services.ekiben.hub = {
      enable = true;
      user = "deploy";
      repository = "/srv/fleet";
      hosts = builtins.listToAttrs (
        map (name: {
          inherit name;
          value.publicKey = keys.${name}.public;
        }) names
      );
    };
    scenario.builds = names;
    systemd.tmpfiles.rules = [ "d /srv/fleet 0755 deploy users -" ];
    environment.etc = {
      "scenario/host-key".text = keys.hub.private;
      "scenario/signer".text = keys.signer.private;
    };
  };
  # a hub that collects when the script says so
  collectsWhenTold =
    { lib, ... }:
    {
      systemd.timers.ekiben-hub-collect.timerConfig = lib.mkForce { OnBootSec = "1h"; };
    };
  # where people publish for a hub elsewhere
  desk =
    { config, ... }:
    {
      environment.systemPackages = [ config.services.ekiben.package ];
      users.users.alice = {
        isNormalUser = true;
        uid = 1001;
        group = "users";
      };
      environment.etc = {
        "scenario/deploy".text = keys.publisher.private;
        "scenario/alice".text = keys.alice.private;
      };
    };
  # the host of this name: asks when the script says so
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
}
