# A fleet from end to end: a hub that publishes, and hosts of three kinds that fetch, deploy and report.
let
  inherit (import ./fleet-machines.nix) host hub;
in
{
  nodes.hub = hub [
    "db"
    "plain"
    "web"
  ];
  # a flake of its own
  nodes.web = host "web";
  # one of several of a flake
  nodes.db = host "db";
  # no flake
  nodes.plain =
    { lib, ... }:
    {
      imports = [ (host "plain") ];
      systemd.services.ekiben-fleet.environment.NIX_PATH = lib.mkForce "nixpkgs=/etc/scenario/nixpkgs";
    };
}
