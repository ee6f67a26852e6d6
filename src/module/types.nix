# Types and options that several parts of the module share.
{ lib }:
let
  inherit (lib) hasPrefix mkOption types;

  timeOfDay =
    default: description:
    mkOption {
      type = types.strMatching "[[:digit:]]{2}:[[:digit:]]{2}";
      inherit default description;
    };

  isShared =
    directory:
    lib.elem directory [
      "/"
      "/boot"
      "/dev"
      "/etc"
      "/home"
      "/nix"
      "/nix/var"
      "/proc"
      "/root"
      "/run"
      "/srv"
      "/sys"
      "/tmp"
      "/usr"
      "/var"
      "/var/cache"
      "/var/lib"
      "/var/log"
      "/var/tmp"
    ]
    || builtins.match "/home/[^/]+" directory != null;
in
rec {
  # not types.path: a Nix path would be copied to the store, where everybody can read it
  externalPath =
    types.addCheck types.str (path: hasPrefix "/" path && !hasPrefix builtins.storeDir path)
    // {
      description = "absolute path outside the Nix store, as a string";
    };
  # for a unit, in which systemd would expand or split another
  unitPath =
    types.addCheck externalPath (path: builtins.match "[^%[:space:]\"'\\]*" path != null)
    // {
      description = "absolute path outside the Nix store, without spaces, quotes and `%`, as a string";
    };
  plainPath =
    types.addCheck externalPath (path: builtins.match "(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+" path != null)
    // {
      description = "absolute path of letters, digits, `_`, `.` and `-`, as a string";
    };
  # who owns these, systemd-tmpfiles is told by Ekiben: no directories of others' may be among them
  ownDirectory = types.addCheck plainPath (path: !isShared path) // {
    description = "${plainPath.description}, not of a directory that others share, such as `/var/lib`";
  };
  ownFile = types.addCheck plainPath (path: !isShared (dirOf path)) // {
    description = "${plainPath.description}, in a directory of its own: not in `/var/lib` itself, for one";
  };

  # for `services.ekiben.settings`, where a user may say otherwise
  asDefaults = lib.mapAttrsRecursive (_: lib.mkDefault);

  isKey =
    key:
    builtins.match "(ssh|ecdsa|sk-ssh|sk-ecdsa)-[a-z0-9@.-]+ AAAA[A-Za-z0-9+/]+=*( .*)?" key != null;
  # one that is none would have every release or commit refused, that which corrects it, too
  publicKey = types.addCheck types.singleLineStr (key: isKey (lib.removeSuffix "\n" key)) // {
    description = "SSH public key, as the line of a `.pub` file";
  };
  # with options, as in ssh-keygen(1)
  signer =
    let
      option = "(cert-authority|[a-z-]+=\"[^\"]*\")";
      bare =
        line: lib.last (builtins.match "(${option}(,${option})* +)?(.*)" (lib.removeSuffix "\n" line));
    in
    types.addCheck types.singleLineStr (line: isKey (bare line))
    // {
      inherit (publicKey) description;
    };

  # as in src/config.rs, which checks it again
  isName = name: builtins.match "[A-Za-z0-9_][A-Za-z0-9_-]{0,63}" name != null;

  # options of some shapes: on or off, with a value or none, with any number of them
  whether =
    default: description:
    mkOption {
      type = types.bool;
      inherit default description;
    };
  orNull =
    type: example: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit example description;
    };
  manyOf =
    type: example: description:
    mkOption {
      type = types.listOf type;
      default = [ ];
      inherit example description;
    };
  seconds =
    default: description:
    mkOption {
      type = types.ints.positive;
      inherit default description;
    };

  timeSpan =
    let
      unit = "(usec|us|msec|ms|seconds?|sec|s|minutes?|min|m|hours?|hr|h|days?|d|weeks?|w)";
    in
    types.addCheck types.str (span: builtins.match "([1-9][0-9]* *${unit}? *)+" span != null)
    // {
      description = "time span as in systemd.time(7), such as `5min`";
    };

  operation = mkOption {
    type = types.enum [
      "switch"
      "boot"
    ];
    default = "switch";
    description = "Whether a new system runs at once, or after the next boot.";
  };
  observe = mkOption {
    type = types.ints.unsigned;
    default = 30;
    example = 300;
    description = ''
      For how many seconds a new system is observed after the switch. Only if no unit dies and all health
      checks keep passing until then, it becomes the system to boot, and has been deployed. `0`
      disables this.
    '';
  };
  build = mkOption {
    type = types.enum [
      "local"
      "substitute"
    ];
    default = "local";
    example = "substitute";
    description = ''
      Where new systems are built: by this machine's Nix, or elsewhere, such as in a CI that does
      {command}`nix copy --to` a binary cache. With `substitute`, a system is evaluated here, nothing is built, and the
      run waits until {option}`nix.settings.substituters` have it, or {option}`timeouts.build` has passed.
    '';
  };
  flags = mkOption {
    type = types.listOf types.str;
    default = [ ];
    example = [
      "--option"
      "extra-substituters"
      "https://cache.example.org"
    ];
    description = "More arguments for {command}`nix build`.";
  };

  reboot = {
    when = mkOption {
      # a boolean by its other name
      type = types.coercedTo types.bool (may: if may then "needed" else "never") (
        types.enum [
          "never"
          "needed"
        ]
      );
      default = "never";
      example = "needed";
      description = ''
        Whether to reboot if kernel, kernel modules or initrd have changed, or if the new system takes effect only then:
        once for a system, and once back if it is not well.
      '';
    };
    window = mkOption {
      type = types.nullOr (
        types.submodule {
          options = {
            lower = timeOfDay "01:00" "The beginning of the window.";
            upper = timeOfDay "05:00" "The end of the window; may be after midnight.";
          };
        }
      );
      default = null;
      example = {
        lower = "01:00";
        upper = "05:00";
      };
      description = "The time of day in which to reboot; `null` for any time.";
    };
    kexec = lib.mkEnableOption "a reboot by {command}`systemctl kexec`, where that works";
  };
  # what `system.autoUpgrade` calls them
  rebootAliases =
    prefix:
    lib.mapAttrsToList
      (
        name: option:
        lib.mkAliasOptionModule (prefix ++ [ name ]) (
          prefix
          ++ [
            "reboot"
            option
          ]
        )
      )
      {
        allowReboot = "when";
        rebootWindow = "window";
      };

  healthCheck = types.submodule {
    options = {
      command =
        orNull types.str "curl -fsS http://localhost/"
          "A shell command that has to succeed. It runs as root, with the programs of the running system.";
      units = manyOf types.str [ "postgresql.service" ] "Units that have to be active.";
      timeout = seconds 30 "How long one attempt may take, in seconds.";
      retries = mkOption {
        type = types.ints.unsigned;
        default = 5;
        description = "How often to retry the check, a second apart.";
      };
      remote = whether false ''
        Whether the check asks another machine, which may fail by itself. It then has the time of all
        attempts together, and is repeated with the old system: if it fails there, too, the new
        one is deployed after all.
      '';
    };
  };
}
