# Hosts that fetch their releases from a web server, with a hub's sshd besides and without one.
let
  inherit (import ./fleet-machines.nix) host hub;
  fromStore =
    name: place:
    { lib, ... }:
    {
      imports = [ (host name) ];
      services.ekiben.fleet = {
        hub = lib.mkForce ({ url = "https://hub"; } // place);
        netrcFile = "/root/netrc";
        fileDirectories = [ ];
      };
      services.ekiben.instances.fleet = {
        networkRetries = 0;
        timeouts.prepare = 12;
      };
    };
in
{
  # of NixOS, nothing but the program curl is in it
  onlyHosts = true;
  nodes.hub = {
    imports = [
      (hub [
        "db"
        "web"
      ])
    ];
    services.ekiben.hub.reports.interval = "1s";
  };
  nodes.web = fromStore "web" { reportsUrl = "https://hub/"; };
  nodes.db = fromStore "db" {
    host = "hub";
    hostKey = (import ./fleet-keys.nix).hub.public;
  };
}
