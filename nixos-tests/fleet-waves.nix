# Roll-outs in waves: on a hub that publishes by itself, and by hand, there and from elsewhere.
let
  inherit (import ./fleet-machines.nix) collectsWhenTold host hub;
  keys = import ./fleet-keys.nix;
in
{
  # what decides here is what the hub notes of its hosts, and the same everywhere
  onlyHosts = true;
  # what ends a roll-out can be cut off between two file operations
  fileFaults = true;
  nodes.hub = { lib, ... }: {
    imports = [
      collectsWhenTold
      (hub [
        "db"
        "plain"
        "web"
      ])
    ];
    services.ekiben = {
      hub = {
        # another user than the one that publishes
        user = lib.mkForce "ekiben-hub";
        publishers = [ keys.publisher.public ];
        metrics = "/var/lib/ekiben-hub-metrics/fleet.prom";
        publish = {
          enable = true;
          user = "deploy";
          dates = null;
          signingKeyFile = "/root/signer";
          parallel = 1;
          waves = [
            {
              hosts = [ "@canaries" ];
              soak = "10s";
            }
            { hosts = [ "web" ]; }
          ];
        };
      };
      webhook = {
        enable = true;
        projects.fleet = {
          tokenFile = "/etc/scenario/token-ci";
          instance = "publish";
        };
      };
    };
    environment.etc."scenario/publisher".text = keys.publisher.private;
  };
  nodes.db = host "db";
  nodes.plain = host "plain";
  nodes.web = host "web";
}
