# A hub that publishes by itself: what is pushed ends on the hosts, and nobody but the unit that publishes has the key.
let
  inherit (import ./fleet-machines.nix) host hub;
  keys = import ./fleet-keys.nix;
in
{
  # what decides here is systemd's and git's, and the same everywhere
  onlyHosts = true;
  nodes.hub = { lib, ... }: {
    imports = [
      (hub [
        "db"
        "plain"
        "web"
      ])
    ];
    services.ekiben = {
      hub.publish = {
        enable = true;
        pull = true;
        signers = [ keys.other.public ];
        inputs = [ "other" ];
        dates = null;
        signingKeyFile = "/root/signer";
        # one after the other, for what is cut off in between
        parallel = 1;
      };
      webhook = {
        enable = true;
        projects.fleet = {
          tokenFile = "/etc/scenario/token-ci";
          instance = "publish";
        };
      };
    };
    systemd.services.ekiben-publish.environment.NIX_PATH = lib.mkForce "nixpkgs=/etc/scenario/nixpkgs";
    environment.etc."scenario/committer".text = keys.other.private;
    # what the manual has for a CI job is what is tried here
    environment.etc."scenario/deploy.sh".text = lib.findFirst (lib.hasPrefix "#!/bin/sh") null (
      lib.splitString "```" (
        lib.replaceStrings [ "```sh\n" ] [ "```" ] (builtins.readFile ../src/fleet/README.md)
      )
    );
  };
  nodes.db = host "db";
  nodes.plain =
    { lib, ... }:
    {
      imports = [ (host "plain") ];
      systemd.services.ekiben-fleet.environment.NIX_PATH = lib.mkForce "nixpkgs=/etc/scenario/nixpkgs";
    };
  nodes.web = host "web";
}
