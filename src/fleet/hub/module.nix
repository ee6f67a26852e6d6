# services.ekiben.hub: a host of the fleet is here a user that can do nothing but SFTP, in a directory that
# holds nothing but what is its own.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  inherit (lib)
    concatStringsSep
    filterAttrs
    hasPrefix
    literalExpression
    mapAttrs
    mapAttrs'
    mapAttrsToList
    mkEnableOption
    mkIf
    mkOption
    nameValuePair
    optionalAttrs
    types
    ;
  inherit (import ../../module/types.nix { inherit lib; })
    asDefaults
    externalPath
    flags
    isKey
    manyOf
    orNull
    ownDirectory
    ownFile
    signer
    unitPath
    whether
    ;
  inherit (import ../../module/sandbox.nix { inherit config lib pkgs; })
    asRoot
    nixPath
    offlineSandbox
    programs
    ;

  cfg = config.services.ekiben;
  ekiben = lib.getExe cfg.package;
  inherit (cfg) hub;
  inherit (hub) publish;
  directories = "${hub.directory}/hosts";
  # a user, and always a group
  account = "ekiben-hub";
  publisher = "ekiben-publisher";
  # a name that cannot be a user's is refused below, and not by NixOS, which knows no hosts
  isHostName = name: builtins.match "[a-z0-9_][a-z0-9_-]{0,24}" name != null;
  hosts = filterAttrs (name: _: isHostName name) hub.hosts;
  forHosts =
    function: mapAttrs' (name: host: nameValuePair "fleet-${name}" (function name host)) hosts;
  keysOf = host: lib.optional (host.publicKey != null) host.publicKey ++ host.publicKeys;

  # a user who logs in by a key, for SFTP only
  sftpUser = name: keys: {
    isSystemUser = true;
    group = name;
    # no password, and yet not locked, which sshd without PAM takes for a refusal
    hashedPassword = "*";
    initialHashedPassword = mkIf config.systemd.sysusers.enable "*";
    openssh.authorizedKeys.keys = map (key: "restrict ${key}") keys;
  };

  hostOptions = types.submodule {
    options = {
      publicKey =
        orNull types.singleLineStr "ssh-ed25519 AAAAC3... root@web"
          "The key that the host logs in with.";
      publicKeys = mkOption {
        type = types.listOf types.singleLineStr;
        default = [ ];
        description = "More such keys, to change the key without a gap.";
      };
      uid =
        orNull types.ints.positive 31000
          "The uid of the host's user on the hub, and the gid of its group. NixOS allocates uids for about 500 hosts.";
      files = mkOption {
        type = types.attrsOf fileOptions;
        default = { };
        example = literalExpression ''
          {
            "/var/lib/secrets/database".source = config.age.secrets.web-database.path;
          }
        '';
        description = ''
          Files for this host only, by their paths on the host, which have to be below one of its
          {option}`services.ekiben.fleet.fileDirectories`. They are never in a Nix store.
        '';
      };
    };
  };

  fileOptions = types.submodule {
    options = {
      source = mkOption {
        type = externalPath;
        example = "/run/secrets/web-database";
        description = ''
          The file on the hub. It is read as root; the directories and links that lead to it have to belong
          to root. Changes are served within a minute.
        '';
      };
      mode = mkOption {
        type = types.strMatching "0[0-7]{3}";
        default = "0400";
        description = "The permissions on the host.";
      };
      owner = mkOption {
        type = types.str;
        default = "root";
        description = "The owner on the host.";
      };
      group = mkOption {
        type = types.str;
        default = "root";
        description = "The group on the host.";
      };
    };
  };

  # The kernel counts what a host leaves. Below the mount is a directory of root's: without the mount,
  # the host can leave nothing. What is lost in a reboot the host sends again.
  mount = name: {
    description = "Reports of ${name} that have not been collected";
    what = "tmpfs";
    where = "${directories}/${name}/reports";
    type = "tmpfs";
    options = concatStringsSep "," [
      "mode=2770"
      "uid=fleet-${name}"
      "gid=${account}"
      "size=${hub.reports.size}"
      "nr_inodes=${toString hub.reports.files}"
      "nodev"
      "noexec"
      "nosuid"
    ];
    wantedBy = [ "multi-user.target" ];
    # not a local file system as others: those come before users and directories do
    after = [ "systemd-tmpfiles-setup.service" ];
    before = [ "umount.target" ];
    conflicts = [ "umount.target" ];
    unitConfig.DefaultDependencies = false;
  };

  timer = description: interval: {
    inherit description;
    wantedBy = [ "timers.target" ];
    timerConfig = {
      OnBootSec = interval;
      OnUnitInactiveSec = interval;
      AccuracySec = "1s";
    };
  };

  # what the one that collects writes, as an option of its command
  written = filterAttrs (_: file: file != null) {
    inherit (hub) metrics;
    html = hub.statusPage;
  };

  hasSettings = written != { } && hub.repository != null;

  collect = {
    description = "Collection of what the hosts of Ekiben's fleet report";
    after = map (name: "${utils.escapeSystemdPath (mount name).where}.mount") (
      builtins.attrNames hosts
    );
    # a short interval must not end it
    startLimitIntervalSec = 0;
    serviceConfig =
      offlineSandbox
      // {
        ExecStart =
          "${ekiben} fleet collect --directory ${hub.directory}"
          + lib.optionalString hasSettings " --repository ${utils.escapeSystemdExecArg hub.repository}"
          + concatStringsSep "" (mapAttrsToList (option: file: " --${option} ${file}") written);
        User = hub.user;
        Group = account;
        ReadWritePaths = [ hub.directory ] ++ map dirOf (builtins.attrValues written);
      }
      # the settings alone
      // optionalAttrs hasSettings {
        ProtectHome = "tmpfs";
        BindReadOnlyPaths = "-${hub.repository}/fleet.json";
      };
  };

  serveFiles = {
    description = "Files for the hosts of Ekiben's fleet";
    wantedBy = [ "multi-user.target" ];
    restartTriggers = [ config.environment.etc."ekiben/config.json".source ];
    # whoever starts it often, as its timer does, must not end it
    startLimitIntervalSec = 0;
    serviceConfig = offlineSandbox // {
      ExecStart = "${ekiben} fleet files";
      # root, to read the sources; not to write where root otherwise may
      CapabilityBoundingSet = "CAP_DAC_READ_SEARCH";
      ProtectHome = "read-only";
      # ProtectProc= has systemd mount it anew, and root could write there: to units, for one
      ReadOnlyPaths = "/run";
      ReadWritePaths = directories;
    };
  };

  publishes = publish.enable && publish.repository != null;
  # the instance that publishes: others may be told of it as of any
  publishInstance = {
    inherit (publish)
      author
      dates
      flags
      inputs
      notify
      pull
      push
      signers
      user
      ;
    flakePath = publish.repository;
    flakeRef = "${publish.repository}#publish";
  };

  # a time span in seconds
  inSeconds =
    span:
    let
      parts = builtins.match "([0-9]+)(s|min|h|d)" span;
      unit = {
        s = 1;
        min = 60;
        h = 3600;
        d = 86400;
      };
    in
    lib.toIntBase10 (lib.elemAt parts 0) * unit.${lib.elemAt parts 1};

  waveOptions = types.submodule {
    options = {
      hosts = mkOption {
        type = types.nonEmptyListOf types.singleLineStr;
        example = [
          "canary"
          "@laptops-early"
        ];
        description = ''
          Hosts, groups of `fleet.json` behind an `@`, and `*` for all hosts that are in no earlier wave. A name that is neither a
          host's nor a group's has the run fail.
        '';
      };
      soak = mkOption {
        type = types.strMatching "[0-9]+(s|min|h|d)";
        default = "0s";
        example = "1h";
        description = "For how long its hosts have to be healthy on the release before the next wave begins.";
      };
      mayFail = mkOption {
        type = types.ints.unsigned;
        default = 0;
        example = 2;
        description = "How many of its hosts may fail, roll back or refuse the release before that stops the roll-out.";
      };
      waitForSilent = whether false "Whether hosts that have been silent since before, or are held, hold up the next wave.";
    };
  };

  # Releases are published and signed here and nowhere else, so that what evaluates and builds cannot read the key. It
  # evaluates nothing, and reaches nobody.
  release = {
    description = "Releases for the hosts of Ekiben's fleet, by run %i";
    restartIfChanged = false;
    unitConfig = {
      CollectMode = "inactive-or-failed";
      X-StopOnRemoval = false;
    };
    path = programs;
    # the numbers that were published
    environment.XDG_STATE_HOME = "/var/lib/ekiben/instances/publish";
    serviceConfig = offlineSandbox // {
      ExecStart = "${ekiben} release publish %i";
      LoadCredential = mkIf (publish.signingKeyFile != null) "signing-key:${publish.signingKeyFile}";
      PrivateUsers = true;
      ReadWritePaths = hub.directory;
      StateDirectory = "ekiben/instances/publish";
      StateDirectoryMode = "0700";
      SyslogIdentifier = "ekiben";
      # as long as the run that waits for it
      TimeoutStartSec = "infinity";
      User = publish.user;
    };
  };

  assertions =
    let
      # without the comment
      bare =
        key:
        builtins.unsafeDiscardStringContext (concatStringsSep " " (lib.take 2 (lib.splitString " " key)));
      # all at once: each host's with each other's would be a million of a thousand hosts
      ownersOf = builtins.zipAttrsWith (_: lib.id) (
        lib.concatLists (
          mapAttrsToList (name: host: map (key: { ${bare key} = name; }) (lib.unique (keysOf host))) hub.hosts
        )
      );
      unnumbered = lib.length (lib.filter (host: host.uid == null) (builtins.attrValues hub.hosts));
      perHost =
        name: host:
        let
          # with this one, if it has a key
          owners = lib.genAttrs (lib.concatMap (key: ownersOf.${bare key}) (keysOf host)) (_: null);
          wrong = lib.filter (key: !isKey key) (keysOf host);
        in
        [
          {
            assertion = isHostName name;
            message = "`services.ekiben.hub.hosts.${name}` must be named by at most 25 lowercase letters, digits, `_` and `-`.";
          }
          {
            assertion = keysOf host != [ ];
            message = "`services.ekiben.hub.hosts.${name}.publicKey` must be set: without a key, the host cannot log in.";
          }
          {
            assertion = wrong == [ ];
            message = "`services.ekiben.hub.hosts.${name}.publicKeys` must be lines of `.pub` files, not `${concatStringsSep "` and `" wrong}`.";
          }
          {
            assertion = keysOf host == [ ] || builtins.attrNames owners == [ name ];
            message = "`services.ekiben.hub.hosts.${name}.publicKeys`: ${concatStringsSep " and " (builtins.attrNames owners)} have the same key.";
          }
        ]
        ++ mapAttrsToList (path: _: {
          assertion =
            builtins.match "(/[^/]+)+" path != null
            && lib.intersectLists [ "." ".." ] (lib.splitString "/" path) == [ ]
            && !hasPrefix "${builtins.storeDir}/" path;
          message = "`services.ekiben.hub.hosts.${name}.files.\"${path}\"` must be an absolute path outside of the Nix store, without `.` and `..`.";
        }) host.files;
    in
    [
      {
        assertion = hub.user == account || config.users.users ? ${hub.user};
        message = "`services.ekiben.hub.user`: user `${hub.user}` does not exist; set `users.users.${hub.user}.isNormalUser = true;`.";
      }
      {
        assertion =
          hub.user != "root"
          && !lib.elem hub.user ([ publisher ] ++ builtins.attrNames (forHosts (_: _: null)));
        message = "`services.ekiben.hub.user` must not be `${hub.user}`: use an unprivileged user other than those of hosts and publishers.";
      }
      {
        assertion = unnumbered <= 500;
        message = "`services.ekiben.hub.hosts`: ${toString unnumbered} hosts are more than NixOS has uids for; set `uid` for each, such as `uid = 31000;`.";
      }
      {
        assertion =
          cfg.metrics == null || !lib.elem (dirOf cfg.metrics) (map dirOf (builtins.attrValues written));
        message = "`services.ekiben.hub.metrics` and `statusPage` must be in other directories than `services.ekiben.metrics`, whose is root's.";
      }
      {
        assertion = lib.all isKey hub.publishers;
        message = "`services.ekiben.hub.publishers` must be lines of `.pub` files, not `${
          concatStringsSep "` and `" (lib.filter (key: !isKey key) hub.publishers)
        }`.";
      }
    ]
    ++ lib.optional publish.enable {
      assertion = publish.repository != null;
      message = "`services.ekiben.hub.publish.repository` must be set: it is what is published.";
    }
    ++ lib.concatLists (mapAttrsToList perHost hub.hosts);

in
{
  imports = [ ./sshd.nix ];

  options.services.ekiben.hub = {
    enable = mkEnableOption "the hub of a fleet, from which other machines fetch what they are to run";
    hosts = mkOption {
      type = types.attrsOf hostOptions;
      default = { };
      example = literalExpression ''
        {
          web.publicKey = "ssh-ed25519 AAAAC3... root@web";
        }
      '';
      description = ''
        The hosts of the fleet. Each logs in to sshd as the user `fleet-<name>`, and sees only its own
        directory. Other settings of sshd are unchanged, but `AllowUsers` and `AllowGroups` do not
        apply to these users, and an earlier `Match` block that applies to them takes precedence.

        Of a host that is removed here, everything but its files stays for 30 days.
      '';
    };
    repository = orNull externalPath "/var/fleet" ''
      The fleet's repository, for {command}`ekiben fleet` in other directories. It belongs to
      {option}`user`.
    '';
    directory = mkOption {
      type = ownDirectory;
      default = "/var/lib/ekiben-hub";
      description = ''
        Where the hub keeps releases and reports. All directories above it have to belong to root, and to be
        writable by root only.
      '';
    };
    user = mkOption {
      type = types.str;
      default = account;
      example = "alice";
      description = "The user who may publish here and read what hosts report. The default one is created.";
    };
    publishers = manyOf types.singleLineStr [ "ssh-ed25519 AAAAC3... alice@desk" ] ''
      SSH keys that may publish and read what hosts report from other machines, as the user
      `ekiben-publisher`, who can do nothing else. Set `directory` in `fleet.json` to
      `"sftp://ekiben-publisher@<this machine>"`, with `:<port>` if needed.
    '';
    publish = {
      enable = mkEnableOption ''
        the instance `publish`, which publishes the fleet's repository by itself: by its timer, {command}`ekiben trigger
        publish`, or a project of {option}`services.ekiben.webhook` whose `instance` is `publish`'';
      repository = mkOption {
        type = types.nullOr externalPath;
        default = hub.repository;
        defaultText = literalExpression "config.services.ekiben.hub.repository";
        example = "/var/fleet";
        description = "The fleet's repository, with a `fleet.json`. It belongs to {option}`user`.";
      };
      user = mkOption {
        type = types.str;
        default = hub.user;
        defaultText = literalExpression "config.services.ekiben.hub.user";
        example = "fleet";
        description = "The unprivileged user who owns the repository. Fetching, evaluating, building and publishing are done as this user.";
      };
      inputs = orNull (types.listOf types.str) [ "nixpkgs" ] ''
        The inputs to update in each run, in all flakes of the repository that have them; `[ ]` for all inputs, `null`
        for none. A run fails if any other input would change.
      '';
      pull = whether false "Whether to start from the upstream of the branch, as {option}`services.ekiben.instances.<name>.pull`.";
      push = whether false "Whether to push updates of inputs to the upstream when they have been published. Nothing is ever forced.";
      signers = manyOf signer [ "ssh-ed25519 AAAAC3... alice@desk" ] ''
        SSH public keys. If not empty, nothing is published but commits that one of them has signed, and updates of inputs
        on top of those: see {option}`services.ekiben.instances.<name>.signers`.
      '';
      author = mkOption {
        type = types.strMatching "[^<>\n]+ <[^<>\n]+>";
        default = "ekiben <ekiben@${config.networking.hostName}>";
        defaultText = literalExpression ''"ekiben <ekiben@''${config.networking.hostName}>"'';
        example = "fleet <fleet@example.org>";
        description = "Author and committer of the commits that update inputs.";
      };
      dates = mkOption {
        type = types.nullOr types.str;
        default = "daily";
        example = "04:40";
        description = ''
          When to look for something new without being asked, in the format of {manpage}`systemd.time(7)`; `null` for
          never. It also renews what is about to expire.
        '';
      };
      signingKeyFile = orNull unitPath (literalExpression "config.age.secrets.fleet-signer.path") ''
        The private key, without a passphrase, that signs releases; {option}`services.ekiben.fleet.signers` of the hosts
        has the public one. It is read by systemd, so it can be readable by root only, and is seen by the unit that
        publishes alone: not by what evaluates and builds.
      '';
      parallel = mkOption {
        type = types.ints.positive;
        default = 2;
        example = 8;
        description = "How many hosts to evaluate and build at once.";
      };
      waves =
        manyOf waveOptions
          (literalExpression ''
            [
              {
                hosts = [
                  "canary"
                  "@laptops-early"
                ];
                soak = "1h";
              }
              { hosts = [ "*" ]; }
            ]
          '')
          ''
            Which hosts get a release first, and which later: a wave begins when the hosts of the one before have been healthy for
            its {option}`soak`. All is built and signed at the beginning. Hosts that are in no wave come last, together. If there
            are none, all hosts get a release at once.
          '';
      inherit flags;
      notify = mkOption {
        type = types.attrsOf types.str;
        default = { };
        example.command = "curl -fsS -d \"$EKIBEN_MESSAGE\" https://ntfy.example.org/fleet";
        description = "Whom to tell how a run has ended: as {option}`services.ekiben.instances.<name>.notify`.";
      };
    };
    metrics = orNull ownFile "/var/lib/ekiben-hub-metrics/fleet.prom" ''
      A text file for Prometheus' node exporter (its `textfile` collector) with the state of each host and when it was heard
      of last, replaced in one step whenever reports are collected. Its directory belongs to {option}`user`, and is another
      than that of {option}`services.ekiben.metrics`.
    '';
    statusPage = orNull ownFile "/var/lib/ekiben-hub-page/index.html" ''
      An HTML page that shows the same as {command}`ekiben fleet status`, replaced in one step whenever reports are collected.
      Its directory belongs to {option}`user`.
    '';
    reports = {
      size = mkOption {
        type = types.strMatching "[1-9][0-9]*[kMG]";
        default = "8M";
        description = ''
          How much a host may leave before it is collected. It is kept in memory: all hosts together can
          take this much each.
        '';
      };
      files = mkOption {
        type = types.ints.between 8 1000000;
        default = 128;
        description = "How many files a host may leave before they are collected.";
      };
      interval = mkOption {
        # what is older than ten minutes is not believed any more
        type = types.strMatching "([1-9][0-9]?|[12][0-9][0-9]|300)s|[1-5]min" // {
          description = "time span of at most `300s` or `5min`";
        };
        default = "30s";
        description = "How often to collect.";
      };
    };
  };

  config = mkIf hub.enable {
    services.ekiben = {
      enable = mkIf publish.enable (lib.mkDefault true);
      instances.publish = mkIf publishes publishInstance;
      settings.hub = asDefaults {
        inherit (hub) directory;
        files = mapAttrs (_: host: host.files) hosts;
      };
      settings.instances = mkIf publishes {
        publish.publish = asDefaults {
          inherit (hub) directory;
          inherit (publish) parallel;
          waves = map (wave: wave // { soak = inSeconds wave.soak; }) publish.waves;
        };
      };
    };
    inherit assertions;
    # not for root, who would do what another user's files say
    environment.extraInit = lib.optionalString (hub.repository != null) ''
      [ "$(id -u)" = 0 ] || export EKIBEN_FLEET=${lib.escapeShellArg hub.repository}
    '';
    users.groups = {
      ekiben-hosts = { };
      ${account}.members = [ hub.user ];
      # who may publish, from here or from elsewhere
      ${publisher}.members = [ hub.user ] ++ lib.optional publish.enable publish.user;
    }
    // forHosts (_: host: { gid = host.uid; });
    users.users =
      forHosts (
        name: host:
        sftpUser "fleet-${name}" (keysOf host)
        // {
          inherit (host) uid;
          description = "Host ${name} of Ekiben's fleet";
          extraGroups = [ "ekiben-hosts" ];
          home = "${directories}/${name}";
        }
      )
      // optionalAttrs (hub.user == account) {
        ${account} = {
          isSystemUser = true;
          description = "Publisher of Ekiben's fleet";
          group = account;
          home = "${hub.directory}/home";
        };
      }
      // optionalAttrs (hub.publishers != [ ]) {
        ${publisher} = sftpUser publisher hub.publishers // {
          description = "Publishers of Ekiben's fleet, from elsewhere";
          home = hub.directory;
        };
      };
    systemd = {
      mounts = map mount (builtins.attrNames hosts);
      services = {
        ekiben-hub-collect = collect;
        ekiben-hub-files = serveFiles;
        ekiben-publish = mkIf (publishes && cfg.enable) {
          environment = {
            XDG_STATE_HOME = "/var/lib/ekiben/instances/publish";
          }
          // nixPath;
          serviceConfig.ExecStart = lib.mkForce [
            "${asRoot} begin publish"
            "${ekiben} prepare publish"
            "${ekiben} build publish"
            "${asRoot} publish publish"
          ];
        };
        "ekiben-release-publish@" = mkIf (publishes && cfg.enable) release;
      };
      timers = {
        ekiben-hub-collect = timer "Timer of the collection of reports" hub.reports.interval;
        # a file can be replaced in so many ways that whoever watches it misses one
        ekiben-hub-files = timer "Timer of the files for hosts" "1min";
      };
      # sshd wants all that leads to a host's directory to be root's, and nobody else's to change
      tmpfiles.rules = [
        "d ${hub.directory} 0755 root root -"
        "d ${hub.directory}/received 0750 ${hub.user} ${publisher} -"
        # when another user has become the hub's
        "Z ${hub.directory}/received - ${hub.user} - -"
        # what is to be published later, and for whom nothing is
        "d ${hub.directory}/rollout 0770 ${hub.user} ${publisher} -"
        "d ${directories} 0750 root ${publisher} -"
        # what there is of hosts that were removed a while ago
        "d ${directories}/.removed 0700 root root 0"
      ]
      ++ lib.optional publish.enable "d ${hub.directory}/heard 0755 ${hub.user} root -"
      ++ map (file: "d ${dirOf file} 0755 ${hub.user} ${account} -") (builtins.attrValues written)
      ++ lib.optional (hub.user == account) "d ${hub.directory}/home 0700 ${account} ${account} -"
      ++ lib.concatMap (name: [
        "d ${directories}/${name} 0755 root root -"
        "d ${directories}/${name}/release 0775 ${hub.user} ${publisher} -"
        # what root makes there gets the host's group
        "d ${directories}/${name}/files 2750 root fleet-${name} -"
      ]) (builtins.attrNames hosts);
    };
  };
}
