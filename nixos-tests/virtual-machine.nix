# A machine of a scenario as a virtual machine that can build itself again: the same NixOS with other
# contents.
#
# Its system.nix evaluates the very same test again, with what it is given added to the machine
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
  # with the contents that every first commit has
  first =
    machine:
    (import ./. { inherit self nixpkgs; }).system.config pkgs name machine {
      app = ./input;
      other = ./input;
      revision = "none";
    };
in
{
  imports = lib.optional (rebuilt != null) rebuilt;
  config = lib.mkMerge [
    {
      environment.etc = {
        "scenario/flake.nix".source = ../ci/hosts/stand-in/etc/scenario/flake.nix;
        "scenario/nixpkgs".source = nixpkgs;
        "scenario/system.nix".text = ''
          { app, other, name, revision }:
          let
            # already in the store, so neither copied nor read
            flake =
              path: narHash: inputs:
              let
                outPath = builtins.path { name = "source"; inherit path; sha256 = narHash; };
                self = (import (outPath + "/flake.nix")).outputs (inputs // { inherit self; }) // { inherit narHash outPath; };
              in
              self;
            nixpkgs = flake "${nixpkgs}" "${nixpkgs.narHash}" { };
            ekiben = flake "${self}" "${self.narHash}" { inherit nixpkgs; };
          in
          builtins.mapAttrs
            (_: system: system nixpkgs.legacyPackages.${pkgs.stdenv.hostPlatform.system} "${name}" name {
              inherit app other revision;
            })
            (import (ekiben + "/nixos-tests") { self = ekiben; inherit nixpkgs; }).system
        '';
      };
      # they evaluate all of NixOS, and an emulated one is slow at it
      scenario.patience = if config.boot.isContainer then 8 else 30;
      system.switch.enable = true;
      # else evaluations collect more garbage than they need to
      nix.envVars.GC_INITIAL_HEAP_SIZE = "1G";
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
      systemd.services = lib.mkIf config.boot.isContainer (
        lib.mkMerge [
          (lib.mkIf config.services.ekiben.enable (
            lib.mapAttrs' (name: _: {
              name = "ekiben-${name}";
              value.serviceConfig.PrivateUsers = lib.mkForce false;
            }) config.services.ekiben.instances
          ))
          (lib.mkIf config.services.ekiben.fleet.enable {
            ekiben-deliver.serviceConfig.PrivateUsers = lib.mkForce false;
            "ekiben-reach@".serviceConfig.PrivateUsers = lib.mkForce false;
          })
          (lib.mkIf config.services.ekiben.webhook.enable {
            ekiben-webhook.serviceConfig = {
              PrivateUsers = lib.mkForce false;
              # its programs may need another system's loader
              BindReadOnlyPaths = map (path: "-${path}") [
                "/lib"
                "/lib64"
                "/usr/lib"
              ];
            };
          })
        ]
      );
      virtualisation = {
        memorySize = 3072;
        writableStore = true;
        # what was built is there after a boot
        writableStoreUseTmpfs = false;
        # In containers nothing makes it so by itself: those of several tests would write into one store, and what one
        # runs another removes, in whose database it is not.
        fileSystems."/nix/store" = lib.mkIf config.boot.isContainer {
          device = "overlay";
          fsType = "overlay";
          options = [
            "lowerdir=/nix/.ro-store"
            "upperdir=/nix/.rw-store/store"
            "workdir=/nix/.rw-store/work"
          ];
          depends = [ "/nix/.ro-store" ];
        };
      };
      # without a boot loader, it is always booted with what it was made with
      boot.postBootCommands = lib.mkAfter ''
        system=$(readlink -f /nix/var/nix/profiles/system)
        if [ -e "$system" ]; then
          "$system/activate"
          ln -sfn "$system" /run/booted-system
        fi
      '';
    }
    (lib.mkIf (rebuilt == null && config.scenario.builds != [ ]) (
      let
        systems = map (machine: (first machine).system.build.toplevel) config.scenario.builds;
        recipes = map (system: system.drvPath) systems;
        # What they are built from, Nix finds in the store: not where it writes nothing there, as in
        # `nix flake check --no-build`.
        isWriting = builtins.pathExists (
          builtins.unsafeDiscardStringContext (
            builtins.toFile "recipes" (builtins.unsafeDiscardStringContext (toString recipes))
          )
        );
      in
      {
        system.includeBuildDependencies = isWriting;
        system.extraDependencies = [
          nixpkgs.outPath
          self.outPath
        ]
        ++ systems;
        virtualisation.additionalPaths = lib.optionals isWriting recipes;
      }
    ))
  ];
}
