# What the module renders for a scenario's machines, as texts: machine -> file -> contents.
#
# These are NixOS' own modules and unit generator. Only the packages whose paths appear in the
# units are stand-ins, so that the paths point into a host's /usr.
{
  nixpkgs,
  pkgs,
  scenario,
}:
let
  inherit (nixpkgs) lib;

  usr = {
    type = "derivation";
    name = "usr";
    pname = "usr";
    version = "2.30";
    out = usr;
    outPath = "/usr";
    outputs = [ "out" ];
    meta.mainProgram = "ekiben";
  };
  standIns = lib.genAttrs [
    "coreutils"
    "curl"
    "ekiben"
    "findutils"
    "gitMinimal"
    "gnugrep"
    "gnused"
    "gnutar"
    "grub2"
    "gzip"
    "nix"
    "openssh"
    "util-linux"
    "xz"
  ] (_: usr);

  evaluate =
    name: node:
    import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = null;
      modules = [
        ../module.nix
        ./machine.nix
        node
        (
          { config, ... }:
          {
            # where the stand-ins are
            systemd.services.ekiben-webhook = lib.mkIf config.services.ekiben.webhook.enable {
              serviceConfig.BindReadOnlyPaths = [
                "/lib"
                "/lib64"
                "/usr"
              ];
            };
          }
        )
        (
          { config, ... }:
          {
            services.ekiben.package = lib.mkIf config.scenario.otherBinary (
              lib.mkForce (usr // { outPath = "/usr/local"; })
            );
          }
        )
        {
          _module.args.pkgs = lib.mkForce (pkgs // standIns);
          nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system;
          networking.hostName = lib.mkDefault name;
          scenario.faultPoints = scenario.faultPoints or false;
          nix.package = usr;
          # as far as it matters, Debian's
          programs.ssh.package = usr // {
            version = "10.0";
          };
          systemd.package = usr;
          # Debian's own
          systemd.globalEnvironment = lib.mkForce { };
          system.stateVersion = lib.trivial.release;
          # what every NixOS has to have; never built
          boot.loader.grub.enable = false;
          fileSystems."/" = {
            device = "none";
            fsType = "tmpfs";
          };
        }
      ];
    };

  render =
    name: node:
    let
      inherit (evaluate name node) config options;
      failed = map (assertion: assertion.message) (
        lib.filter (assertion: !assertion.assertion) config.assertions
      );
      units = lib.filterAttrs (
        unit: _: lib.hasInfix "ekiben" unit || lib.hasPrefix "scenario" unit
      ) config.systemd.units;
      etc = lib.filterAttrs (file: _: lib.hasPrefix "scenario/" file) config.environment.etc;
      isOurs = name: lib.hasPrefix "ekiben" name || lib.hasPrefix "fleet-" name;
      user =
        user:
        ''
          g ${user.group} -
          u ${user.name} ${
            if user.uid == null then "-" else toString user.uid
          }:${user.group} - ${user.home} ${if user.isNormalUser then "/bin/bash" else "-"}
        ''
        + lib.concatMapStrings (group: "m ${user.name} ${group}\n") (
          lib.filter (group: !isOurs group) user.extraGroups
        );
      users = lib.filter (user: user.isNormalUser || isOurs user.name) (
        builtins.attrValues config.users.users
      );
      groups = lib.filterAttrs (name: _: isOurs name) config.users.groups;
      group =
        name:
        { members, ... }:
        "g ${name} -\n" + lib.concatMapStrings (user: "m ${user} ${name}\n") members;
      # what others than NixOS say
      ours =
        option:
        lib.filter (
          definition: !lib.hasPrefix "${nixpkgs}" definition.file
        ) option.definitionsWithLocations;
      sshd =
        let
          inherit (config.services.openssh) authorizedKeysFiles ports settings;
          names = lib.unique (
            lib.concatMap (definition: builtins.attrNames definition.value) (
              ours options.services.openssh.settings
            )
          );
          value =
            value:
            if builtins.isBool value then
              (if value then "yes" else "no")
            else
              lib.concatMapStringsSep " " toString (lib.toList value);
        in
        lib.concatMapStrings (name: "${name} ${value settings.${name}}\n") names
        + lib.concatMapStrings (port: "Port ${toString port}\n") ports
        + "AuthorizedKeysFile ${toString authorizedKeysFiles}\n"
        + lib.concatMapStrings (definition: definition.value) (ours options.services.openssh.extraConfig);
      # the section that NixOS ends such a unit with
      installed =
        unit:
        unit.text
        + lib.optionalString (
          unit.requiredBy != [ ]
        ) "RequiredBy=${lib.concatStringsSep " " unit.requiredBy}\n";
    in
    lib.throwIf (failed != [ ]) (lib.concatStringsSep "\n" failed) (
      {
        "etc/hostname" = "${config.networking.hostName}\n";
        "etc/sysusers.d/scenario.conf" =
          lib.concatMapStrings user users + lib.concatStrings (lib.mapAttrsToList group groups);
        "etc/tmpfiles.d/scenario.conf" =
          lib.concatMapStrings (user: "d ${user.home} 0700 ${user.name} ${user.group} -\n") (
            lib.filter (user: user.createHome) users
          )
          + lib.concatMapStrings (rule: "${rule}\n") (
            lib.filter (
              rule:
              lib.hasInfix " /var/lib/ekiben" rule
              || lib.hasInfix " /var/lib/node-exporter" rule
              || lib.hasInfix "secrets" rule
              || lib.hasInfix " deploy " rule
            ) config.systemd.tmpfiles.rules
          );
      }
      // lib.mapAttrs' (file: value: lib.nameValuePair "etc/${file}" value.text) etc
      // lib.mapAttrs' (
        unit: value: lib.nameValuePair "etc/systemd/system/${unit}" (installed value)
      ) units
      // lib.optionalAttrs config.services.openssh.enable {
        "etc/systemd/system/sshd.service".link = "/usr/lib/systemd/system/ssh.service";
        "etc/systemd/system/multi-user.target.wants/sshd.service".link =
          "/usr/lib/systemd/system/ssh.service";
        "etc/ssh/sshd_config.d/scenario.conf" = sshd;
      }
      // lib.concatMapAttrs (
        name: user:
        lib.optionalAttrs (user.openssh.authorizedKeys.keys != [ ]) {
          "etc/ssh/authorized_keys.d/${name}" = lib.concatMapStrings (
            key: "${key}\n"
          ) user.openssh.authorizedKeys.keys;
        }
      ) config.users.users
      // lib.concatMapAttrs (
        name: service: lib.optionalAttrs (isOurs name) { "etc/pam.d/${name}" = service.text; }
      ) config.security.pam.services
      // lib.optionalAttrs (config.environment.etc ? "ekiben/config.json") {
        "etc/ekiben/config.json" = builtins.toJSON config.services.ekiben.settings;
      }
    );

  # the parts of a system that a switch to it installs
  switched = lib.filterAttrs (
    file: text:
    builtins.isString text && (lib.hasPrefix "etc/systemd" file || lib.hasPrefix "etc/ekiben" file)
  );
  # what is different in a variant, and what is not there
  renderVariant =
    name: node: variant: addition:
    let
      original = switched (render name node);
      varied = switched (
        render name {
          imports = [
            node
            addition
          ];
        }
      );
      different = lib.filterAttrs (file: text: original.${file} or null != text) varied;
      removed = builtins.attrNames (removeAttrs original (builtins.attrNames varied));
    in
    lib.mapAttrs' (file: lib.nameValuePair "variants/${variant}/${file}") (
      different // { removed = lib.concatMapStrings (file: "${file}\n") removed; }
    );
in
lib.mapAttrs (
  name: node:
  render name node // lib.concatMapAttrs (renderVariant name node) (scenario.variants.${name} or { })
) scenario.nodes
