# A hub that is neither where the fleet's repository is nor where anything is evaluated, with its sshd
# on another port: two people publish to it from a third machine, over SFTP, and a host follows.
let
  keys = import ./fleet-keys.nix;
in
{
  # the host's releases are of stand-in systems, which only namespace hosts have
  onlyHosts = true;
  nodes.desk = {
    imports = [ (import ./fleet-machines.nix).desk ];
    environment.etc."scenario/other".text = keys.other.private;
  };
  nodes.hub = {
    services.ekiben.hub = {
      enable = true;
      hosts.web.publicKey = keys.web.public;
      hosts.web.files."/var/lib/secrets/web".source = "/root/secret";
      publishers = [
        keys.publisher.public
        keys.alice.public
      ];
      reports.interval = "1s";
    };
    services.openssh = {
      ports = [ 2222 ];
      # or the hub would hang up on an attacker before it has tried everything
      settings.PerSourcePenalties = "no";
    };
    environment.etc."scenario/host-key".text = keys.hub.private;
  };
  nodes.web = {
    services.ekiben.instances.fleet.networkRetries = 1;
    services.ekiben.fleet = {
      enable = true;
      hub = {
        host = "hub";
        port = 2222;
        hostKey = keys.hub.public;
      };
      identityFile = "/root/identity";
      dates = null;
    };
    environment.etc."scenario/identity".text = keys.web.private;
  };
}
