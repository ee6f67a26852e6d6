# The scenarios: every `<name>.nix` here that has a `<name>.py` beside it.
#
# The Nix file holds the machines (`nodes`, as in a NixOS test), the Python file, behind
# common.py, the script. Both run twice: here as a NixOS test, on virtual machines that rebuild
# a real NixOS; and, where there is no Nix, on the namespace hosts of ci/hosts, from what the
# module renders for the same machines. Where `onlyHosts` is set, they run on those alone.
{ self, nixpkgs }:
let
  inherit (nixpkgs) lib;

  files = builtins.readDir ./.;
  names = lib.filter (name: files ? "${name}.py") (
    map (lib.removeSuffix ".nix") (lib.filter (lib.hasSuffix ".nix") (builtins.attrNames files))
  );
  scenarios = lib.genAttrs names (name: import (./. + "/${name}.nix"));

  # what all machines of a scenario are; `rebuilt` is what one adds when it builds itself again, see
  # virtual-machine.nix
  machine =
    pkgs: name: rebuilt:
    { lib, ... }:
    {
      imports = [
        self.nixosModules.default
        ./machine.nix
        (import ./virtual-machine.nix {
          inherit
            self
            nixpkgs
            name
            rebuilt
            ;
        })
        (lib.mkIf (scenarios.${name}.faultPoints or false) {
          scenario.faultPoints = true;
          services.ekiben.package = self.packages.${pkgs.stdenv.hostPlatform.system}.ekiben-fault-points;
        })
      ];
    };

  test =
    pkgs: name: rebuilt:
    pkgs.testers.runNixOSTest {
      inherit name;
      inherit (scenarios.${name}) nodes;
      defaults = machine pkgs name rebuilt;
      testScript = builtins.readFile ./common.py + real (builtins.readFile (./. + "/${name}.py"));
      # of a script that says no types, that tells next to nothing, and takes longer than many a run
      skipTypeCheck = true;
      # an emulated machine is some 20 times slower than one with KVM
      globalTimeout = 4 * 3600;
    };

  # of a script, what a real NixOS decides, or needs for that: not what is between these two lines
  real =
    script:
    let
      parts = lib.splitString "\n# on hosts alone\n" script;
      after = part: lib.concatStrings (lib.tail (lib.splitString "\n# everywhere" part));
    in
    lib.concatStrings ([ (lib.head parts) ] ++ map after (lib.tail parts)) + "\n";

  # of a machine, by what it is given
  addition =
    name: machine: scenario:
    let
      file = scenario.app + "/variant";
      variant = if builtins.pathExists file then lib.fileContents file else "default";
    in
    {
      imports = [
        ./addition.nix
        { inherit scenario; }
      ]
      ++ lib.optional (variant != "default") scenarios.${name}.variants.${machine}.${variant};
    };

  rendered =
    pkgs: lib.mapAttrs (_: scenario: import ./render.nix { inherit nixpkgs pkgs scenario; }) scenarios;
in
{
  tests =
    pkgs:
    lib.mapAttrs (name: _: test pkgs name null) (
      lib.filterAttrs (_: scenario: !(scenario.onlyHosts or false)) scenarios
    );

  # what a machine of a scenario builds itself from again, with what it is given
  system = {
    # evaluated
    config =
      pkgs: name: host: scenario:
      (test pkgs name (addition name host scenario)).nodes.${host};

    # a module, for those who have no flake
    module = pkgs: name: host: scenario: {
      imports = [
        (nixpkgs + "/nixos/lib/testing/nixos-test-base.nix")
        # before 26.05 that has it already
        (nixpkgs + "/nixos/modules/virtualisation/qemu-vm.nix")
        (machine pkgs name (addition name host scenario))
        scenarios.${name}.nodes.${host}
        (test pkgs name null).nodes.${host}.system.build.networkConfig
      ];
    };
  };

  # scenario -> machine -> file -> contents
  inherit rendered;

  renderedCheck =
    pkgs:
    pkgs.runCommand "ekiben-rendered"
      {
        # the texts alone: what they name need not be there
        rendered = builtins.unsafeDiscardStringContext (builtins.toJSON (rendered pkgs));
        passAsFile = [ "rendered" ];
        nativeBuildInputs = [ pkgs.python3 ];
      }
      ''
        python3 ${../ci/render} --check --json "$renderedPath" --directory ${../ci/rendered}
        touch $out
      '';
}
