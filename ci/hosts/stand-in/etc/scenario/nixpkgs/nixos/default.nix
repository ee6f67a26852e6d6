# Stands in for Nixpkgs, as far as a plain configuration.nix needs it.
{ }: import <nixos-config>
