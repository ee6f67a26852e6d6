# A machine of a scenario as a virtual machine that can rebuild itself, from a flake in
# /var/nixos-config, to the same NixOS with other contents.
#
# The flake evaluates the very same test again, with what its inputs say added to the machine
# (`rebuilt`); all that such a system is built from is put into the machine beforehand.
{
  self,
  nixpkgs,
  name,
  rebuilt,
}:
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (config.networking) hostName;
  # with the contents that every first commit has
  first = (import ./. { inherit self nixpkgs; }).rebuilt pkgs name hostName {
    app = ./input;
    other = ./input;
    revision = "none";
  };
in
{
  imports = lib.optional (rebuilt != null) rebuilt;
  config = lib.mkMerge [
    {
      environment.etc."scenario/flake.nix".text = ''
        {
          inputs = {
            nixpkgs.url = "path:${nixpkgs}";
            ekiben = {
              url = "path:${self}";
              inputs.nixpkgs.follows = "nixpkgs";
            };
            app = {
              url = "git+file:///srv/app";
              flake = false;
            };
            other = {
              url = "git+file:///srv/other";
              flake = false;
            };
          };
          outputs =
            { self, nixpkgs, ekiben, app, other }:
            {
              nixosConfigurations.${hostName}.config =
                (import "''${ekiben}/nixos-tests" { self = ekiben; inherit nixpkgs; }).rebuilt
                  nixpkgs.legacyPackages.${pkgs.stdenv.hostPlatform.system} "${name}" "${hostName}"
                  { inherit app other; revision = self.rev or "none"; };
            };
        }
      '';
      # they evaluate all of NixOS, and an emulated one is slow at it
      scenario.patience = if config.boot.isContainer then 8 else 30;
      system.switch.enable = true;
      nix.settings = {
        experimental-features = [
          "nix-command"
          "flakes"
        ];
        substituters = lib.mkForce [ ];
        flake-registry = "";
      };
      environment.systemPackages = [
        pkgs.curl
        pkgs.git
        pkgs.jq
        pkgs.python3
      ];
      services.ekiben.package = lib.mkIf config.scenario.otherBinary (
        lib.mkForce (
          pkgs.runCommand "ekiben-elsewhere" { meta.mainProgram = "ekiben"; } ''
            install -D ${
              lib.getExe self.packages.${pkgs.stdenv.hostPlatform.system}.ekiben-fault-points
            } $out/bin/ekiben
          ''
        )
      );
      # a machine that is a container in a chroot, as a test driver may have it, has none
      systemd.services.ekiben-webhook =
        lib.mkIf (config.boot.isContainer && config.services.ekiben.webhook.enable)
          {
            serviceConfig = {
              PrivateUsers = lib.mkForce false;
              # its programs may need another system's loader
              BindReadOnlyPaths = map (path: "-${path}") [
                "/lib"
                "/lib64"
                "/usr/lib"
              ];
            };
          };
      virtualisation = {
        memorySize = 3072;
        writableStore = true;
      };
    }
    (lib.mkIf (rebuilt == null && config.services.ekiben.enable) {
      system.includeBuildDependencies = true;
      system.extraDependencies = [
        nixpkgs.outPath
        self.outPath
        first.system.build.toplevel
      ];
      virtualisation.additionalPaths = [ first.system.build.toplevel.drvPath ];
    })
  ];
}
