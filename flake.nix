{
  description = "Ekiben keeps a NixOS machine up to date from the inside";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      eachSystem =
        function:
        lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
          system: function nixpkgs.legacyPackages.${system}.pkgs
        );

      package =
        {
          lib,
          rustPlatform,
          buildFeatures ? [ ],
        }:
        rustPlatform.buildRustPackage {
          pname = "ekiben";
          inherit buildFeatures;
          inherit ((lib.importTOML ./Cargo.toml).package) version;
          src = lib.fileset.toSource {
            root = ./.;
            fileset = lib.fileset.unions [
              ./Cargo.toml
              ./Cargo.lock
              ./.cargo
              ./.clippy.toml
              ./.rustfmt.toml
              # not what is beside it, which makes no other program
              (lib.fileset.difference ./src (
                lib.fileset.fileFilter (file: file.hasExt "md" || file.hasExt "nix") ./src
              ))
            ];
          };
          cargoLock.lockFile = ./Cargo.lock;
          postInstall = ''
            install -Dm644 -t $out/share/man/man1 src/ekiben.1
            install -Dm644 src/completions/ekiben.bash $out/share/bash-completion/completions/ekiben
            install -Dm644 -t $out/share/fish/vendor_completions.d src/completions/ekiben.fish
            install -Dm644 src/completions/ekiben.zsh $out/share/zsh/site-functions/_ekiben
          '';
          meta = {
            description = "Keeps a NixOS machine up to date from the inside";
            license = lib.licenses.mit;
            mainProgram = "ekiben";
            platforms = lib.platforms.linux;
          };
        };

      scenarios = import ./nixos-tests { inherit self nixpkgs; };

      # before 25.11 the formatter of RFC 166 had another name, and this one was another's
      nixfmt =
        pkgs: if lib.versionAtLeast lib.trivial.release "25.11" then pkgs.nixfmt else pkgs.nixfmt-rfc-style;
    in
    {
      packages = eachSystem (pkgs: rec {
        ekiben = pkgs.callPackage package { };
        # for tests only: see src/fault.rs
        ekiben-fault-points =
          (pkgs.callPackage package { buildFeatures = [ "fault-points" ]; }).overrideAttrs
            {
              # larger, but sooner there
              CARGO_PROFILE_RELEASE_LTO = "false";
              CARGO_PROFILE_RELEASE_CODEGEN_UNITS = "16";
              CARGO_PROFILE_RELEASE_OPT_LEVEL = "0";
            };
        default = ekiben;
        docs = import ./src/module/page.nix { inherit self nixpkgs pkgs; };
      });

      overlays.default = final: _: { ekiben = final.callPackage package { }; };

      nixosModules = rec {
        ekiben =
          { lib, pkgs, ... }:
          {
            imports = [ ./module.nix ];
            services.ekiben.package = lib.mkDefault self.packages.${pkgs.stdenv.hostPlatform.system}.default;
          };
        default = ekiben;
      };

      # what module.nix makes of the scenarios' machines: ci/render writes it to ci/rendered
      legacyPackages = eachSystem (pkgs: {
        rendered = scenarios.rendered pkgs;
      });

      checks = eachSystem (
        pkgs:
        scenarios.tests pkgs
        // {
          options = import ./nixos-tests/options.nix { inherit self nixpkgs pkgs; };
          rendered = scenarios.renderedCheck pkgs;
          # the page of all options is current, and the package has its man page and completions
          docs =
            pkgs.runCommand "ekiben-docs"
              { inherit (self.packages.${pkgs.stdenv.hostPlatform.system}) ekiben docs; }
              ''
                diff -u ${./src/options.md} $docs || { echo "src/options.md is not current: run ci/render"; exit 1; }
                cd $ekiben/share
                ls man/man1/ekiben.1* bash-completion/completions/ekiben fish/vendor_completions.d/ekiben.fish zsh/site-functions/_ekiben
                touch $out
              '';
          clippy = self.packages.${pkgs.stdenv.hostPlatform.system}.default.overrideAttrs (old: {
            pname = "ekiben-clippy";
            nativeBuildInputs = (old.nativeBuildInputs or [ ]) ++ [
              pkgs.cargo
              pkgs.clippy
            ];
            buildPhase = "cargo clippy --offline --all-targets --all-features -- --deny warnings";
            installPhase = "touch $out";
            doCheck = false;
          });
          format = pkgs.runCommand "ekiben-format" { } ''
            cd ${
              lib.fileset.toSource {
                root = ./.;
                fileset = lib.fileset.unions (
                  map (lib.fileset.fileFilter (file: file.hasExt "nix")) [
                    ./flake.nix
                    ./module.nix
                    ./nixos-tests
                    ./src
                  ]
                );
              }
            }
            find . -name '*.nix' -exec ${lib.getExe (nixfmt pkgs)} --check {} +
            ${lib.getExe pkgs.deadnix} --fail .
            touch $out
          '';
        }
      );

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree or (nixfmt pkgs));

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ self.packages.${pkgs.stdenv.hostPlatform.system}.default ];
          packages = [
            pkgs.clippy
            pkgs.deadnix
            (nixfmt pkgs)
            pkgs.rust-analyzer
            pkgs.rustfmt
          ];
        };
      });

      apps = eachSystem (pkgs: {
        # the main job, told as a story, on one virtual machine
        demo = {
          type = "app";
          program = lib.getExe (scenarios.tests pkgs).demo.driver;
          meta.description = "Ekiben's main job, told as a story, on one virtual machine";
        };
      });
    };
}
