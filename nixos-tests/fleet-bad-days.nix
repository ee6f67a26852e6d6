# What can go wrong between a hub and a host, and with what the hub publishes.
let
  inherit (import ./fleet-machines.nix) collectsWhenTold;
  keys = import ./fleet-keys.nix;
  server = {
    host = "hub";
    hostKey = keys.hub.public;
  };
in
{
  # holds a run while something else happens: see src/fault.rs
  faultPoints = true;
  nodes.hub = {
    imports = [ collectsWhenTold ];
    services.ekiben.hub = {
      enable = true;
      hosts.web.publicKey = keys.web.public;
    };
    # a hub that is down says so
    networking.firewall.rejectPackets = true;
    environment.etc = {
      "scenario/host-key".text = keys.hub.private;
      "scenario/signer".text = keys.signer.private;
      "scenario/other".text = keys.other.private;
    };
  };
  nodes.web = { lib, ... }: {
    # a test need not wait long
    services.ekiben.instances.fleet = {
      networkRetries = 1;
      healthChecks.hub.timeout = lib.mkForce 10;
      healthChecks.hub.retries = lib.mkForce 0;
    };
    services.ekiben.fleet = {
      enable = true;
      # one of two hubs is always down
      hub = [
        (server // { port = 2222; })
        server
      ];
      identityFile = "/root/identity";
      sshOptions = [ "ConnectTimeout=3" ];
      signers = [ keys.signer.public ];
      dates = null;
    };
    environment.etc."scenario/identity".text = keys.web.private;
  };
}
