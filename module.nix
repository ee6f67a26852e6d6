# The NixOS module: options in, one JSON file and systemd units out, nothing else.
#
# The units are the state machine and the sandbox. What each directive is for is said where it
# is missing or surprising; src/ says what the stages do.
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

  cfg = config.services.ekiben;
  ekiben = lib.getExe cfg.package;
  hostName = config.networking.hostName;

  # not types.path: a Nix path would be copied to the store, where everybody can read it
  externalPath =
    types.addCheck types.str (path: hasPrefix "/" path && !hasPrefix builtins.storeDir path)
    // {
      description = "absolute path outside the Nix store, as a string";
    };
  plainPath =
    types.addCheck externalPath (path: builtins.match "(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+" path != null)
    // {
      description = "absolute path of letters, digits, `_`, `.` and `-`, as a string";
    };
  # without needless slashes
  tidy =
    path:
    "/"
    + concatStringsSep "/" (lib.filter (part: part != "" && part != ".") (lib.splitString "/" path));
  # as in src/config.rs, which checks it again
  isName = name: builtins.match "[A-Za-z0-9_][A-Za-z0-9_-]{0,63}" name != null;
  isFree = name: isName name && !lib.elem name reserved;
  reserved = lib.splitString "\n" (lib.fileContents ./src/reserved-names);

  instance = types.submodule (
    { config, ... }:
    {
      options = {
        flakePath = mkOption {
          type = externalPath;
          apply = tidy;
          example = "/var/nixos-config";
          description = "The git repository that holds this machine's flake. It belongs to {option}`user`.";
        };
        flakeRef = mkOption {
          type = types.str;
          apply =
            reference:
            let
              parts = builtins.match "(git\\+file://|path:)?(/[^?#]*)(.*)" reference;
              part = builtins.elemAt parts;
            in
            if parts == null then reference else "${toString (part 0)}${tidy (part 1)}${part 2}";
          default = "${config.flakePath}#${hostName}";
          defaultText = literalExpression ''"''${flakePath}#''${config.networking.hostName}"'';
          example = "/var/nixos-config?dir=hosts#web";
          description = ''
            The flake in {option}`flakePath` and its NixOS configuration to deploy, as for
            {command}`nixos-rebuild --flake`. Without `#name`, the host name is taken.
          '';
        };
        user = mkOption {
          type = types.str;
          example = "deploy";
          description = ''
            The unprivileged user whose repository this is. Fetching, evaluating and building are
            done as this user, with the SSH keys, {file}`.netrc` and git configuration of its home.
          '';
        };
        inputs = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "my-project" ];
          description = "The flake inputs to update; no other may change. All inputs if empty.";
        };
        dates = mkOption {
          type = types.nullOr types.str;
          default = "04:40";
          example = "daily";
          description = ''
            When to look for something new without being asked, in the format of
            {manpage}`systemd.time(7)`; `null` for never.
          '';
        };
        persistent = mkOption {
          type = types.bool;
          default = true;
          description = "Whether to make up for a run that was due while the machine was off.";
        };
        randomizedDelaySec = mkOption {
          type = types.str;
          default = "0";
          example = "45min";
          description = "Delay each run of the timer by a random time of at most this.";
        };
        fixedRandomDelay = mkOption {
          type = types.bool;
          default = false;
          description = "Whether {option}`randomizedDelaySec` leads to the same delay every time.";
        };
        inherit operation flags;
        pull = mkOption {
          type = types.bool;
          default = false;
          description = ''
            Whether to start from the upstream of the branch that is checked out, if that is ahead.
            A branch and an upstream that both have commits of their own are an error.
          '';
        };
        push = mkOption {
          type = types.bool;
          default = false;
          description = "Whether to push to the upstream what has been deployed. Nothing is ever forced.";
        };
        author = mkOption {
          type = types.strMatching "[^<>\n]+ <[^<>\n]+>";
          default = "ekiben <ekiben@${hostName}>";
          defaultText = literalExpression ''"ekiben <ekiben@''${config.networking.hostName}>"'';
          description = "Author and committer of the commits that update {file}`flake.lock`.";
        };
        healthChecks = mkOption {
          type = types.attrsOf healthCheck;
          default = { };
          example = literalExpression ''
            {
              site.command = "curl -fsS http://localhost/";
              database.units = [ "postgresql.service" ];
            }
          '';
          description = ''
            What tells whether a new system does its work. A check counts only if it passed before the
            switch; if it does not pass any more after it, the old system is put back.
          '';
        };
        onUnitFailure = mkOption {
          type = types.enum [
            "rollback"
            "keep"
          ];
          default = "rollback";
          description = ''
            What to do if a unit fails in the switch that had not failed before: put the old system back,
            or keep the new one and report a warning.
          '';
        };
        rollback = mkOption {
          type = types.bool;
          default = true;
          description = ''
            Whether to put the old system back when the new one is not well. If not, what has been
            done so far stays: the new system runs, but the old one may be booted.
          '';
        };
        inherit observe;
        networkRetries = mkOption {
          type = types.ints.unsigned;
          default = 5;
          description = "How often to try again to fetch when the network fails, after 1 s, 2 s, 4 s and so on.";
        };
        timeouts = mkOption {
          type = types.submodule {
            options = {
              prepare = seconds 1800 "For fetching all inputs.";
              build = seconds 14400 "For evaluating and building.";
              activate = seconds 1800 "For one activation: of the new system, and of the old one if it is put back.";
            };
          };
          default = { };
          description = "How long the stages of a run may take, in seconds.";
        };
        hub = mkOption {
          type = types.nullOr types.attrs;
          default = null;
          internal = true;
          description = "Where releases come from, see {option}`services.ekiben.fleet`.";
        };
        extraPackages = mkOption {
          type = types.listOf types.package;
          default = [ ];
          example = literalExpression "[ pkgs.git-crypt ]";
          description = "More programs for {option}`user`'s stages, such as the repository's git filters.";
        };
      };
    }
  );

  # what an instance and a host of a fleet have in common
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
      For how many seconds a new system is observed after the switch: only if until then no unit has died and all
      health checks have gone on passing, it is made what is booted, and has been deployed. 0: not at all.
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

  seconds =
    default: description:
    mkOption {
      type = types.ints.positive;
      inherit default description;
    };

  healthCheck = types.submodule {
    options = {
      command = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "curl -fsS http://localhost/";
        description = "A shell command that has to succeed. It is run as root, with the programs of the running system.";
      };
      units = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "postgresql.service" ];
        description = "Units that have to be active.";
      };
      timeout = seconds 30 "How long one attempt may take, in seconds.";
      retries = mkOption {
        type = types.ints.unsigned;
        default = 5;
        description = "How many more attempts a check has, a second apart.";
      };
      remote = mkOption {
        type = types.bool;
        default = false;
        description = ''
          Whether it asks another machine, which may fail by itself. Such a check has as long as all its
          attempts may take, and is made once more with the old system put back: if it fails there, too, the
          new one is not to blame, and is deployed after all.
        '';
      };
    };
  };

  project = types.submodule {
    options = {
      tokenFile = mkOption {
        type = externalPath;
        example = literalExpression ''config.age.secrets."my-project-token".path'';
        description = ''
          A file with the bearer token of this project: at least 16 letters, digits and `-._~+/`, with
          one line end at most. It is read by systemd, so it can be anywhere and readable by root only.
        '';
      };
      extraTokenFiles = mkOption {
        type = types.listOf externalPath;
        default = [ ];
        description = "Files with more tokens of this project, for the time in which its token is changed.";
      };
      instance = mkOption {
        type = types.str;
        example = "my-project";
        description = "The instance that this project's token starts.";
      };
    };
  };

  timeOfDay =
    default: description:
    mkOption {
      type = types.strMatching "[[:digit:]]{2}:[[:digit:]]{2}";
      inherit default description;
    };

  server = types.submodule {
    options = {
      host = mkOption {
        type = types.str;
        example = "hub.example.org";
        description = "Name or address of the hub.";
      };
      port = mkOption {
        type = types.port;
        default = 22;
        description = "The port of its sshd.";
      };
      hostKey = mkOption {
        type = types.singleLineStr;
        example = "ssh-ed25519 AAAAC3...";
        description = "Its public host key. Nothing is fetched from a hub that has another one.";
      };
      user = mkOption {
        type = types.str;
        default = "fleet-${cfg.fleet.name}";
        defaultText = literalExpression ''"fleet-''${config.services.ekiben.fleet.name}"'';
        description = "Whom to log in as.";
      };
    };
  };

  # a fleet host is an instance whose repository is its own, and whose commits are the hub's releases
  fleetInstance = {
    inherit (cfg.fleet)
      user
      dates
      randomizedDelaySec
      operation
      observe
      flags
      ;
    flakePath = "/var/lib/ekiben/instances/fleet/repository";
    flakeRef = "/var/lib/ekiben/instances/fleet/repository#${cfg.fleet.name}";
    inherit (cfg.fleet.selfUpdate) inputs;
    healthChecks = cfg.fleet.healthChecks // {
      hub = {
        command = "${ekiben} reach fleet";
        timeout = 40;
        retries = 2;
        remote = true;
      };
    };
    hub = {
      inherit (cfg.fleet) name signers sshOptions;
      servers = lib.toList cfg.fleet.hub;
      selfUpdate = cfg.fleet.selfUpdate.enable;
      inherit (cfg.fleet) fileDirectories;
    };
  };

  reboot = {
    description = "Reboot into what Ekiben has deployed, if it takes one";
    restartIfChanged = false;
    unitConfig.X-StopOnRemoval = false;
    path = [ config.systemd.package ];
    serviceConfig = {
      Type = "oneshot";
      ExecStart =
        let
          inherit (cfg.fleet.reboot) kexec window;
        in
        concatStringsSep " " (
          [ "${ekiben} reboot" ]
          ++ lib.optional kexec "--kexec"
          ++ lib.optional (window != null) "--between ${window.lower} ${window.upper}"
        );
    };
  };

  # what src/config.rs reads; its keys are the options
  settings = {
    webhook =
      if !cfg.webhook.enable then
        null
      else
        {
          inherit (cfg.webhook) path;
          inherit (cfg.webhook) projects;
        };
    instances = mapAttrs (
      _: instance:
      {
        inherit (instance)
          flakePath
          user
          inputs
          operation
          flags
          pull
          push
          author
          healthChecks
          onUnitFailure
          rollback
          observe
          networkRetries
          timeouts
          ;
        flakeRef = withConfiguration instance.flakeRef;
      }
      // optionalAttrs (instance.hub != null) { inherit (instance) hub; }
    ) cfg.instances;
  };
  withConfiguration = ref: if lib.hasInfix "#" ref then ref else "${ref}#${hostName}";

  # what systemd would not understand, and then never start
  timesOf =
    name: instance:
    let
      expect =
        option: kind: value:
        lib.escapeShellArgs [
          "expect"
          (if instance.hub == null then "instances.${name}.${option}" else "fleet.${option}")
          (lib.getExe' config.systemd.package "systemd-analyze")
          kind
          value
        ];
    in
    lib.optionals (instance.dates != null) [
      (expect "dates" "calendar" instance.dates)
      (expect "randomizedDelaySec" "timespan" instance.randomizedDelaySec)
    ];

  # a configuration that the program would refuse fails here, not on the machine
  checked =
    pkgs.runCommand "ekiben-config.json"
      {
        json = builtins.toJSON settings;
        passAsFile = [ "json" ];
      }
      ''
        cp "$jsonPath" config.json
        ${lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) ''
          ${ekiben} check config.json
          expect() {
              "$2" "$3" "$4" > /dev/null || { echo "\`services.ekiben.$1\` must be as in systemd.time(7), not \`$4\`."; exit 1; }
          }
          ${concatStringsSep "\n" (lib.concatLists (mapAttrsToList timesOf cfg.instances))}
        ''}
        cp config.json $out
      '';

  # for everything that is not root's
  sandbox = {
    AmbientCapabilities = "";
    # "", not [ ]: an empty list is rendered as no line at all, and drops nothing
    CapabilityBoundingSet = "";
    KeyringMode = "private";
    LockPersonality = true;
    MemoryDenyWriteExecute = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    # instead of RemoveIPC=, which would remove what the user has outside, too
    PrivateIPC = true;
    PrivateTmp = true;
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
  };

  # for what fetches as the user
  networkSandbox = sandbox // {
    # SSH keys, .netrc and git configuration are there
    ProtectHome = "read-only";
    # The user's systemd, D-Bus, containers and whatever else starts a program for who asks by a socket would do so
    # outside: of /run, there is only what resolves names, and what secrets managers and nix.conf put there.
    TemporaryFileSystem = [
      "/dev/mqueue"
      "/dev/shm"
      "/run:ro"
    ];
    BindReadOnlyPaths = map (path: "-/run/${path}") [
      "NetworkManager/resolv.conf"
      "agenix"
      "agenix.d"
      "booted-system"
      "current-system"
      "keys"
      "nscd"
      "resolvconf"
      "secrets"
      "secrets.d"
      "systemd/resolve"
    ];
    InaccessiblePaths = "/dev/pts";
    # the user's processes outside cannot be traced, nor their memory, files and root directories be opened
    PrivateUsers = true;
    # netlink: the resolver sorts addresses by it
    RestrictAddressFamilies = [
      "AF_UNIX"
      "AF_INET"
      "AF_INET6"
      "AF_NETLINK"
    ];
    SystemCallFilter = [
      "@system-service"
      "~@privileged"
    ];
  };

  # for oneshot services that need no network
  offlineSandbox = sandbox // {
    Type = "oneshot";
    IPAddressDeny = "any";
    PrivateNetwork = true;
    ProtectHome = true;
    # not even systemd's own socket, or root would be root
    RestrictAddressFamilies = "none";
    SystemCallFilter = [
      "@system-service"
      "~@privileged"
    ];
    TimeoutStartSec = "10min";
  };

  webhookAddress =
    if cfg.webhook.socket != null then
      cfg.webhook.socket
    else if lib.hasInfix ":" cfg.webhook.host then
      "[${cfg.webhook.host}]:${toString cfg.webhook.port}"
    else
      "${cfg.webhook.host}:${toString cfg.webhook.port}";

  # NixOS leaves a socket that has changed as it is: this has it listen at its new address
  webhookMove = {
    description = "Address of Ekiben's webhook";
    wantedBy = [ "multi-user.target" ];
    reloadIfChanged = true;
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      # the argument is what changes: NixOS looks at no description
      ExecStart = "${lib.getExe' pkgs.coreutils "true"} ${webhookAddress}";
      ExecReload = "${lib.getExe' config.systemd.package "systemctl"} restart ekiben-webhook.socket";
    };
  };

  webhookSocket = {
    description = "Socket of Ekiben's webhook";
    wantedBy = [ "sockets.target" ];
    listenStreams = [ webhookAddress ];
    socketConfig = {
      # an address that comes up later than this
      FreeBind = true;
      # the token decides who may do what, as it does on TCP
      SocketMode = "0666";
      # a service that fails again and again must not take the socket with it
      TriggerLimitIntervalSec = 0;
    };
    unitConfig = insistent;
  };

  # a token that is put into its place, or changed, counts at once
  webhookTokens = {
    description = "Tokens of Ekiben's webhook";
    wantedBy = [ "paths.target" ];
    unitConfig = insistent;
    pathConfig = {
      PathChanged = lib.unique (lib.concatMap tokenFiles (builtins.attrValues cfg.webhook.projects));
      Unit = "ekiben-restart@ekiben-webhook.service.service";
    };
  };
  tokenFiles = project: [ project.tokenFile ] ++ project.extraTokenFiles;

  # systemd itself restarts services only
  insistent.OnFailure = "ekiben-restart@%n.service";
  restart = {
    description = "Restart of %i";
    # until it has succeeded
    startLimitIntervalSec = 0;
    serviceConfig = {
      Type = "oneshot";
      ExecStart = "${lib.getExe' config.systemd.package "systemctl"} restart %i";
      Restart = "on-failure";
      # what the other unit says is enough
      LogLevelMax = "crit";
    }
    // growingPauses "1s" "10s";
  };

  growingPauses = first: last: {
    RestartSec = first;
    RestartSteps = 4;
    RestartMaxDelaySec = last;
  };

  # as in src/token.rs
  webhookCredentials = lib.concatMapAttrs (
    name: project:
    {
      "token-${name}" = project.tokenFile;
    }
    // lib.listToAttrs (
      lib.imap1 (number: nameValuePair "token-${name}.${toString number}") project.extraTokenFiles
    )
  ) cfg.webhook.projects;

  webhookService = {
    description = "Ekiben's webhook";
    # not only when somebody knocks, so that a token that is missing is seen at once
    wantedBy = [ "multi-user.target" ];
    requires = [ "ekiben-webhook.socket" ];
    after = [ "ekiben-webhook.socket" ];
    # or the switch would stop the socket, too, and refuse connections
    stopIfChanged = false;
    restartTriggers = [ checked ];
    startLimitIntervalSec = 0;
    serviceConfig =
      sandbox
      // growingPauses "200ms" "1s"
      // {
        Type = "notify";
        ExecStart = "${ekiben} webhook";
        Restart = "always";
        WatchdogSec = "30s";
        DynamicUser = true;
        # may write the queue, and nothing else
        SupplementaryGroups = [ "ekiben" ];
        LoadCredential = mapAttrsToList (name: file: "${name}:${file}") webhookCredentials;
        # one that is missing is one project's trouble, not all others'
        SetCredential = map (name: "${name}:\\n") (builtins.attrNames webhookCredentials);
        UMask = "0007";
        # of the file system, only this. (TemporaryFileSystem=/ would do nothing: DynamicUser= implies
        # ProtectSystem=strict, which takes the place of it.)
        RootDirectory = "/var/lib/ekiben/root";
        BindReadOnlyPaths = [
          builtins.storeDir
          "/etc/ekiben"
          # where the link in it leads
          "-/etc/static/ekiben"
          "/run/systemd/notify"
          "/var/lib/ekiben/status"
        ];
        BindPaths = [ "/var/lib/ekiben/queue" ];
        BindLogSockets = false;
        # writable ones of its own are made for it, which it does not need
        TemporaryFileSystem = [
          "/dev/mqueue:ro"
          "/dev/shm:ro"
          "/tmp:ro"
          "/var/tmp:ro"
        ];
        # the inherited socket goes on to be the world's; no other can be opened
        PrivateNetwork = true;
        RestrictAddressFamilies = "AF_UNIX";
        IPAddressDeny = "any";
        PrivateIPC = true;
        PrivateUsers = true;
        ProcSubset = "pid";
        ProtectHome = true;
        DevicePolicy = "closed";
        SystemCallFilter = [
          "@system-service"
          "~@privileged"
          "~@resources"
        ];
        LimitCORE = 0;
        # of the queue's disk, a file of its own must take no more
        LimitFSIZE = "4K";
        LimitNOFILE = 256;
        MemoryMax = "32M";
        TasksMax = 4;
      };
  };

  path = name: _: {
    description = "Requests for Ekiben's instance ${name}";
    wantedBy = [ "paths.target" ];
    unitConfig = insistent;
    # each takes one of the few inotify instances that root has
    pathConfig.PathExists = [
      "/var/lib/ekiben/queue/${name}"
      # a run that was cut off
      "/var/lib/ekiben/runs/${name}.json"
    ];
  };

  timer = name: instance: {
    description = "Timer of Ekiben's instance ${name}";
    wantedBy = [ "timers.target" ];
    timerConfig = {
      OnCalendar = instance.dates;
      Persistent = instance.persistent;
      RandomizedDelaySec = instance.randomizedDelaySec;
      FixedRandomDelay = instance.fixedRandomDelay;
      AccuracySec = "1s";
    };
  };

  # the longest that a run can take by itself: there, checked and observed, back, checked, there, and the same again
  longest =
    instance:
    let
      inherit (instance) timeouts;
      checks = mapAttrsToList (
        _: check: (check.retries + 1) * (check.timeout + 1) * 4
      ) instance.healthChecks;
    in
    3600
    + timeouts.prepare * (instance.networkRetries + 1)
    + timeouts.build
    + timeouts.activate * 6
    + instance.observe * 2
    + lib.foldl' (a: b: a + b) 0 checks;

  programs = [
    config.nix.package
    config.programs.ssh.package
    pkgs.gitMinimal
    pkgs.gnutar
    pkgs.gzip
    pkgs.util-linux
    pkgs.xz
  ];

  # a run whose switch removed its instance, and that was cut off then, has no unit any more
  orphans = {
    description = "End of Ekiben's runs for instances that are gone";
    wantedBy = [ "multi-user.target" ];
    unitConfig.ConditionDirectoryNotEmpty = "/var/lib/ekiben/runs";
    restartIfChanged = false;
    path = programs;
    serviceConfig = {
      # a switch that starts this must not wait for it: this waits for the switch
      Type = "exec";
      ExecStart = "${ekiben} conclude";
    };
  };

  # + is root without the sandbox, but not without TemporaryFileSystem=, BindReadOnlyPaths= and PrivateIPC=
  asRoot = "+${lib.getExe' pkgs.util-linux "nsenter"} --target 1 --mount --root --wd --ipc ${ekiben}";

  service = name: instance: {
    description = "Deployment by Ekiben's instance ${name}";
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    # it survives the switch that it makes
    restartIfChanged = false;
    stopIfChanged = false;
    unitConfig.X-StopOnRemoval = false;
    # requests are never refused for being many
    startLimitIntervalSec = 0;
    path = programs ++ instance.extraPackages;
    environment =
      config.nix.envVars
      // config.networking.proxy.envVars
      // {
        # the home is read-only
        XDG_CACHE_HOME = "/var/cache/ekiben/${name}";
      }
      # a plain configuration.nix is for the Nixpkgs of this machine
      // optionalAttrs (instance.hub != null && config.environment.sessionVariables ? NIX_PATH) {
        inherit (config.environment.sessionVariables) NIX_PATH;
      };
    serviceConfig =
      networkSandbox
      // growingPauses "500ms" "10s"
      // {
        Type = "oneshot";
        ExecStart = [
          "${asRoot} begin ${name}"
          "${ekiben} prepare ${name}"
          "${ekiben} build ${name}"
          "${asRoot} activate ${name}"
        ];
        # whatever happened; does nothing if activate has done it
        ExecStopPost = "${asRoot} conclude ${name}";
        # what could not begin, by its own word (as in src/begin.rs) or by systemd's, has taken no request
        RestartForceExitStatus = "75 STATE_DIRECTORY CACHE_DIRECTORY CREDENTIALS";
        SyslogIdentifier = "ekiben";
        LoadCredential = lib.optional (instance.hub != null) identity;
        SetCredential = lib.optional (instance.hub != null) noIdentity;
        # the stages have limits of their own, which add up to less; a run may have to wait for another's
        TimeoutStartSec = "${toString (2 * longest instance)}s";
        # for what ignores that it is to end; conclude takes its own time
        TimeoutStopSec = "30s";
        NotifyAccess = "exec";
        User = instance.user;
        StateDirectory = "ekiben/instances/${name}";
        StateDirectoryMode = "0700";
        CacheDirectory = "ekiben/${name}";
        CacheDirectoryMode = "0700";
        ReadWritePaths = [ "-${instance.flakePath}" ];
      };
  };

  identity = "identity:${cfg.fleet.identityFile}";
  # if that is missing, which the program then says
  noIdentity = "identity:\\n";

  # The files that the hub has for this host. As what manages secrets does: in a switch and at boot before
  # all other units, when the users are there; also whenever the hub has something new.
  hasFiles = cfg.fleet.fileDirectories != [ ];
  fleetFiles = {
    description = "Files from the fleet's hub";
    wantedBy = [
      "sysinit.target"
      "sysinit-reactivation.target"
    ];
    before = [
      "shutdown.target"
      "sysinit.target"
      "sysinit-reactivation.target"
    ];
    conflicts = [ "shutdown.target" ];
    after = [
      "local-fs.target"
      "systemd-sysusers.service"
      "systemd-tmpfiles-resetup.service"
      "systemd-tmpfiles-setup.service"
    ];
    unitConfig = {
      DefaultDependencies = false;
      RequiresMountsFor = [ "/var/lib/ekiben" ] ++ cfg.fleet.fileDirectories;
    };
    startLimitIntervalSec = 0;
    serviceConfig = offlineSandbox // {
      ExecStart = "${ekiben} install fleet";
      # root, to read what the instance's user has fetched, and to hand it over; not to do what root otherwise may
      CapabilityBoundingSet = "CAP_CHOWN CAP_DAC_READ_SEARCH";
      ProtectHome = "read-only";
      # ProtectProc= has systemd mount it anew, and root could write there: to units, for one
      ReadOnlyPaths = "/run";
      ReadWritePaths = [
        "/var/lib/ekiben/files"
        "/var/lib/ekiben/outbox/fleet"
      ]
      ++ map (directory: "-${directory}") cfg.fleet.fileDirectories;
      SystemCallFilter = [
        "@system-service"
        "~@privileged"
        "@chown"
      ];
    };
  };

  # a run's report; what cannot be delivered now waits for the next poll
  deliver = {
    description = "Delivery of reports to the fleet's hub";
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    startLimitIntervalSec = 0;
    path = programs;
    serviceConfig = networkSandbox // {
      Type = "oneshot";
      ExecStart = "${ekiben} deliver fleet";
      LoadCredential = identity;
      SetCredential = noIdentity;
      TimeoutStartSec = "10min";
      User = cfg.fleet.user;
      StateDirectory = "ekiben/instances/fleet";
      StateDirectoryMode = "0700";
    };
  };

  # NixOS refuses settings that its Nix does not know
  knowsFsync =
    config.nix.enable
    && lib.getName config.nix.package == "nix"
    && lib.versionAtLeast (lib.getVersion config.nix.package) "2.25";

  forInstances =
    function: instances:
    mapAttrs' (name: instance: nameValuePair "ekiben-${name}" (function name instance)) instances;

  assertions =
    let
      inherit (cfg) instances;
      projects = if cfg.webhook.enable then cfg.webhook.projects else { };
      perInstance = name: instance: [
        {
          assertion = isFree name;
          message = "`services.ekiben.instances.${name}`: this name cannot be part of a unit's name. Write one of letters, digits, `_` and `-`, other than ${concatStringsSep ", " reserved}.";
        }
        {
          assertion = config.users.users ? ${instance.user};
          message = "`services.ekiben.instances.${name}.user`: there is no user `${instance.user}`. Write `users.users.${instance.user}.isNormalUser = true;`, or the name of the user that owns ${instance.flakePath}.";
        }
        {
          assertion = lib.all (check: check.command != null || check.units != [ ]) (
            builtins.attrValues instance.healthChecks
          );
          message = "`services.ekiben.instances.${name}.healthChecks`: a check checks nothing. Write a `command`, or the names of `units`.";
        }
        {
          assertion = instance.user != "root";
          message = "`services.ekiben.instances.${name}.user` must not be `root`.";
        }
        {
          assertion = !lib.elem ".." (lib.splitString "/" instance.flakePath);
          message = "`services.ekiben.instances.${name}.flakePath` must not have `..` in it.";
        }
        {
          assertion =
            lib.all (directory: !hasPrefix "${directory}/" "${instance.flakePath}/") unfit
            && !lib.elem instance.flakePath [
              "/"
              "/etc"
              "/home"
              "/root"
              "/var"
            ];
          message = "`services.ekiben.instances.${name}.flakePath` must not be `${instance.flakePath}`: write a directory for the repository alone that outlives a boot, such as `/var/nixos-config`.";
        }
        {
          assertion =
            let
              home = config.users.users.${instance.user}.home or "/var/empty";
            in
            instance.user == "root" || !hasPrefix "${instance.flakePath}/" "${home}/";
          message = "`services.ekiben.instances.${name}.flakePath` must not be the home of `${instance.user}`: runs may write there. Write a directory in it.";
        }
        {
          assertion = isAllowed "allowed-users" instance.user || isAllowed "trusted-users" instance.user;
          message = "`nix.settings.allowed-users` must have `${instance.user}` in it, the user of `services.ekiben.instances.${name}`.";
        }
        {
          assertion = lib.all (unit: lib.hasInfix "." unit) (
            lib.concatMap (check: check.units) (builtins.attrValues instance.healthChecks)
          );
          message = "`services.ekiben.instances.${name}.healthChecks` must have units' full names, such as `postgresql.service`.";
        }
        {
          assertion =
            let
              reference = builtins.head (builtins.match "([^#?]*).*" instance.flakeRef);
              directory = lib.removePrefix "git+file://" (lib.removePrefix "path:" reference);
            in
            directory == instance.flakePath || hasPrefix "${instance.flakePath}/" directory;
          message = "`services.ekiben.instances.${name}.flakeRef`: `${instance.flakeRef}` is not in the repository. Write a flake in `flakePath`, as in `${instance.flakePath}#${hostName}`.";
        }
      ];
      perProject = name: project: [
        {
          assertion = isName name;
          message = "`services.ekiben.webhook.projects.${name}`: this name cannot be a credential's. Write one of letters, digits, `_` and `-`.";
        }
        {
          assertion = instances ? ${project.instance};
          message = "`services.ekiben.webhook.projects.${name}.instance`: there is no instance `${project.instance}`. Write one of `services.ekiben.instances`: ${concatStringsSep ", " (builtins.attrNames instances)}.";
        }
        (
          let
            others = filterAttrs (_: other: lib.elem project.tokenFile (tokenFiles other)) projects;
          in
          {
            assertion = builtins.attrNames others == [ name ];
            message = "`services.ekiben.webhook.projects.${name}.tokenFile`: ${concatStringsSep " and " (builtins.attrNames others)} have the same token file `${project.tokenFile}`. Write one of its own for each.";
          }
        )
      ];
    in
    lib.concatLists (mapAttrsToList perInstance instances ++ mapAttrsToList perProject projects)
    ++ [
      {
        assertion = config.system.switch.enable or true;
        message = "`system.switch.enable` must be `true`: Ekiben switches this system.";
      }
    ]
    ++ lib.optionals cfg.webhook.enable [
      {
        assertion = lib.hasInfix ":" cfg.webhook.host || builtins.match "[0-9.]+" cfg.webhook.host != null;
        message = "`services.ekiben.webhook.host` must be an address such as `127.0.0.1`, not `${cfg.webhook.host}`.";
      }
      {
        assertion = cfg.webhook.nginx == null || config.services.nginx.enable;
        message = "`services.nginx.enable` must be `true` where `services.ekiben.webhook.nginx` is set.";
      }
      {
        assertion = cfg.webhook.caddy == null || config.services.caddy.enable;
        message = "`services.caddy.enable` must be `true` where `services.ekiben.webhook.caddy` is set.";
      }
    ];

  # where a repository is gone after a boot, or is another in the sandbox
  unfit = [
    "/dev"
    "/proc"
    "/run"
    "/sys"
    "/tmp"
    "/var/tmp"
  ];

  groupsOf =
    user:
    let
      account = config.users.users.${user} or { };
      with' = filterAttrs (_: group: lib.elem user group.members) config.users.groups;
    in
    [ (account.group or "") ] ++ (account.extraGroups or [ ]) ++ builtins.attrNames with';

  # whether a setting of Nix names the user
  isAllowed =
    setting: user:
    lib.any (name: lib.elem name (config.nix.settings.${setting} or [ "*" ])) (
      [
        "*"
        user
      ]
      ++ map (group: "@${group}") (groupsOf user)
    );

  # what works, but hardly as it is meant
  warnings =
    let
      inherit (cfg) instances webhook;
      projects = if webhook.enable then builtins.attrValues webhook.projects else [ ];
      perInstance =
        name: instance:
        let
          mighty = lib.intersectLists (groupsOf instance.user) [
            "docker"
            "incus-admin"
            "libvirtd"
            "lxd"
            "podman"
            "wheel"
          ];
        in
        lib.optional
          (lib.any (other: other.flakePath == instance.flakePath && other.user != instance.user) (
            builtins.attrValues instances
          ))
          "`services.ekiben.instances.${name}.user` should be that of all instances with the flakePath `${instance.flakePath}`: git works for its owner only."
        ++
          lib.optional (instance.dates == null && !lib.any (project: project.instance == name) projects)
            "`services.ekiben.instances.${name}` has no trigger but `ekiben trigger ${name}`: set `dates`, or a project of `services.ekiben.webhook`."
        ++
          lib.optional (mighty != [ ])
            "`users.users.${instance.user}` should not be in group `${builtins.head mighty}`: who is can become root, and evaluates `services.ekiben.instances.${name}`."
        ++ lib.optional (isAllowed "trusted-users" instance.user) "`nix.settings.trusted-users` should not have `${instance.user}` in it: Nix lets those become root.";
      isLocal = webhook.host == "::1" || hasPrefix "127." webhook.host;
      inherit (config.networking) firewall;
      opens =
        rules:
        lib.elem webhook.port rules.allowedTCPPorts
        || lib.any (
          range: range.from <= webhook.port && webhook.port <= range.to
        ) rules.allowedTCPPortRanges;
      isOpen =
        !firewall.enable || lib.any opens ([ firewall ] ++ builtins.attrValues firewall.interfaces);
      address = "`services.ekiben.webhook.host` is `${webhook.host}`";
      port = "`networking.firewall.allowedTCPPorts`";
      inherit (config.services) nginx;
      virtualHost = nginx.virtualHosts.${webhook.nginx};
    in
    lib.concatLists (mapAttrsToList perInstance instances)
    ++ lib.optional (instances == { }) "`services.ekiben.instances` is empty: nothing is ever deployed."
    ++ lib.optional config.system.autoUpgrade.enable "`system.autoUpgrade.enable` should be `false` beside `services.ekiben`: each undoes what the other has deployed."
    ++ lib.optionals webhook.enable (
      lib.optional (
        projects == [ ]
      ) "`services.ekiben.webhook.projects` is empty: the webhook refuses everybody."
      ++ lib.optional (
        webhook.socket == null && !isLocal && !isOpen
      ) "${address}, but the port ${toString webhook.port} is not in ${port}: nobody else can reach it."
      ++ lib.optional (
        webhook.socket == null && isLocal && firewall.enable && isOpen
      ) "${address}, but the port ${toString webhook.port} is in ${port}: nobody else can reach it."
      ++
        lib.optional
          (
            webhook.nginx != null
            && !(
              virtualHost.addSSL || virtualHost.enableSSL or false || virtualHost.forceSSL || virtualHost.onlySSL
            )
          )
          "`services.nginx.virtualHosts.\"${webhook.nginx}\"` has no TLS: everybody on the way can read the tokens. Set `forceSSL` and `enableACME`."
      ++
        lib.optional (webhook.caddy != null && hasPrefix "http://" webhook.caddy)
          "`services.ekiben.webhook.caddy` has no TLS: everybody on the way can read the tokens. Leave `http://` out."
    );

  # the hub: what a host of the fleet is here is a user that can do nothing but SFTP, in a directory
  # that holds nothing but what is its own
  inherit (cfg) hub;
  hubHosts = "${hub.directory}/hosts";
  hubUser = "ekiben-hub";
  hubPublisher = "ekiben-publisher";
  # a name that cannot be a user's is refused below, and not by NixOS, which knows no hosts
  isHostName = name: builtins.match "[a-z0-9_][a-z0-9_-]{0,24}" name != null;
  hosts = filterAttrs (name: _: isHostName name) hub.hosts;
  forHosts =
    function: mapAttrs' (name: host: nameValuePair "fleet-${name}" (function name host)) hosts;
  keysOf = host: lib.optional (host.publicKey != null) host.publicKey ++ host.publicKeys;

  hubHost = types.submodule {
    options = {
      publicKey = mkOption {
        type = types.nullOr types.singleLineStr;
        default = null;
        example = "ssh-ed25519 AAAAC3... root@web";
        description = "The key that the host logs in with.";
      };
      publicKeys = mkOption {
        type = types.listOf types.singleLineStr;
        default = [ ];
        description = "More such keys, for the time in which its key is changed.";
      };
      uid = mkOption {
        type = types.nullOr types.ints.positive;
        default = null;
        example = 31000;
        description = "The number of the host's user on the hub, and of its group; NixOS has enough of its own for some 500 hosts.";
      };
      files = mkOption {
        type = types.attrsOf hubFile;
        default = { };
        example = literalExpression ''
          {
            "/var/lib/secrets/database".source = config.age.secrets.web-database.path;
          }
        '';
        description = ''
          Files that only this host may have, by their paths on the host, which have to be below one of its
          {option}`services.ekiben.fleet.fileDirectories`. They are in no Nix store, here or there.
        '';
      };
    };
  };

  hubFile = types.submodule {
    options = {
      source = mkOption {
        type = externalPath;
        example = "/run/secrets/web-database";
        description = ''
          The file on the hub. Root reads it, so it can be root's alone; the directories and links that
          lead to it have to be. What it holds anew counts within a minute.
        '';
      };
      mode = mkOption {
        type = types.strMatching "0[0-7]{3}";
        default = "0400";
        description = "Its permissions on the host.";
      };
      owner = mkOption {
        type = types.str;
        default = "root";
        description = "Its owner on the host.";
      };
      group = mkOption {
        type = types.str;
        default = "root";
        description = "Its group on the host.";
      };
    };
  };

  # Last of all, since all that follows `Match` belongs to it. Whatever is said here is said once
  # more by the keys (`restrict`) and by the permissions of the directories, as far as they can.
  hubSshd = ''
    Match Group ekiben-hosts
      ${hubSessions hubRequests "0027"}
      # whomever the administrator allows besides
      AllowGroups ekiben-hosts
      AllowUsers fleet-*
      ChrootDirectory %h
      MaxSessions 1
  ''
  + lib.optionalString (hub.publishers != [ ]) ''
    Match User ${hubPublisher}
      ${hubSessions (hubRequests ++ hubPublisherRequests) "0022"}
      AllowGroups ${hubPublisher}
      AllowUsers ${hubPublisher}
      ChrootDirectory ${hub.directory}
  ''
  + ''
    Match all
  '';
  hubSessions = requests: mask: ''
    AuthenticationMethods publickey
      PubkeyAuthentication yes
      AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u
      ${lib.optionalString (
        config.services.openssh.authorizedKeysCommand != "none"
      ) "AuthorizedKeysCommand none"}
      TrustedUserCAKeys none
      ${lib.optionalString hubHasPam "PAMServiceName ${hubPam}"}
      ForceCommand internal-sftp -u ${mask} -p ${concatStringsSep "," requests}
      PermitTTY no
      PermitUserRC no
      PermitTunnel no
      DisableForwarding yes
      # OpenSSH 9 does not take the line above for all of these
      AllowAgentForwarding no
      AllowStreamLocalForwarding no
      AllowTcpForwarding no
      X11Forwarding no
      # who is gone must not be waited for
      ClientAliveInterval 15
      ClientAliveCountMax 2'';
  # a session as people have it starts a systemd for its user, outside of the directory, and costs
  # several times as much
  hubPam = "ekiben-hub";
  hubHasPam = lib.versionAtLeast (config.services.openssh.package.version
    or config.programs.ssh.package.version
  ) "9.8";
  # what a host needs to fetch, to leave a report, and to put it in its place; anything else,
  # and what later versions of OpenSSH will know, is refused
  hubRequests = [
    "open"
    "close"
    "read"
    "write"
    "opendir"
    "readdir"
    "stat"
    "lstat"
    "fstat"
    "realpath"
    "rename"
    "posix-rename"
    "limits"
  ];
  # what whoever publishes needs besides: that one does at a time, and that it is on the disk
  hubPublisherRequests = [
    "fsync"
    "hardlink"
    "remove"
  ];

  # The kernel counts what a host leaves. Below the mount is a directory of root's: without the mount,
  # the host can leave nothing. What is lost in a reboot the host sends again.
  hubMount = name: {
    description = "Reports of ${name} that have not been collected";
    what = "tmpfs";
    where = "${hubHosts}/${name}/reports";
    type = "tmpfs";
    options = concatStringsSep "," [
      "mode=2770"
      "uid=fleet-${name}"
      "gid=${hubUser}"
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

  hubTimer = description: interval: {
    inherit description;
    wantedBy = [ "timers.target" ];
    timerConfig = {
      OnBootSec = interval;
      OnUnitInactiveSec = interval;
      AccuracySec = "1s";
    };
  };

  hubCollect = {
    description = "Collection of what the hosts of Ekiben's fleet report";
    after = map (name: "${utils.escapeSystemdPath (hubMount name).where}.mount") (
      builtins.attrNames hosts
    );
    # a short interval must not end it
    startLimitIntervalSec = 0;
    serviceConfig = offlineSandbox // {
      ExecStart = "${ekiben} fleet collect --directory ${hub.directory}";
      User = hub.user;
      Group = hubUser;
      ReadWritePaths = hub.directory;
    };
  };

  hubFiles = {
    description = "Files for the hosts of Ekiben's fleet";
    wantedBy = [ "multi-user.target" ];
    restartTriggers = [ config.environment.etc."ekiben/hub.json".source ];
    # whoever starts it often, as its timer does, must not end it
    startLimitIntervalSec = 0;
    serviceConfig = offlineSandbox // {
      ExecStart = "${ekiben} fleet files /etc/ekiben/hub.json";
      # root, to read the sources; not to write where root otherwise may
      CapabilityBoundingSet = "CAP_DAC_READ_SEARCH";
      ProtectHome = "read-only";
      # ProtectProc= has systemd mount it anew, and root could write there: to units, for one
      ReadOnlyPaths = "/run";
      ReadWritePaths = hubHosts;
    };
  };

  hubAssertions =
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
      isKey =
        key:
        builtins.match "(ssh|ecdsa|sk-ssh|sk-ecdsa)-[a-z0-9@.-]+ AAAA[A-Za-z0-9+/]+=*( .*)?" key != null;
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
            message = "`services.ekiben.hub.hosts.${name}`: this name cannot be part of a user's name. Write one of at most 25 small letters, digits, `_` and `-`.";
          }
          {
            assertion = keysOf host != [ ];
            message = "`services.ekiben.hub.hosts.${name}.publicKey`: without a key, the host cannot log in. Write the line that is in its key's `.pub` file.";
          }
          {
            assertion = wrong == [ ];
            message = "`services.ekiben.hub.hosts.${name}.publicKeys`: `${concatStringsSep "` and `" wrong}` is not a public key and nothing but a public key. Write the line that is in the key's `.pub` file, as in `ssh-ed25519 AAAA...`.";
          }
          {
            assertion = keysOf host == [ ] || builtins.attrNames owners == [ name ];
            message = "`services.ekiben.hub.hosts.${name}.publicKeys`: ${concatStringsSep " and " (builtins.attrNames owners)} have the same key. Make one of its own for each.";
          }
        ]
        ++ mapAttrsToList (path: _: {
          assertion =
            builtins.match "(/[^/]+)+" path != null
            && lib.intersectLists [ "." ".." ] (lib.splitString "/" path) == [ ]
            && !hasPrefix "${builtins.storeDir}/" path;
          message = "`services.ekiben.hub.hosts.${name}.files.\"${path}\"`: a file cannot be there. Write an absolute path outside of the Nix store, without `.` and `..`.";
        }) host.files;
    in
    [
      {
        assertion = hub.user == hubUser || config.users.users ? ${hub.user};
        message = "`services.ekiben.hub.user`: there is no user `${hub.user}`. Write `users.users.${hub.user}.isNormalUser = true;`, or leave the option out.";
      }
      {
        assertion =
          hub.user != "root"
          && !lib.elem hub.user ([ hubPublisher ] ++ builtins.attrNames (forHosts (_: _: null)));
        message = "`services.ekiben.hub.user`: `${hub.user}` must not publish: root has nothing to do with what hosts send, and hosts must not change what others fetch. Write the name of an unprivileged user, or leave the option out.";
      }
      {
        assertion = unnumbered <= 500;
        message = "`services.ekiben.hub.hosts`: NixOS has 600 numbers for the users of all services, too few for ${toString unnumbered} hosts. Write a `uid` of its own for each, as in `uid = 31000;`.";
      }
      {
        assertion = lib.all isKey hub.publishers;
        message = "`services.ekiben.hub.publishers`: `${
          concatStringsSep "` and `" (lib.filter (key: !isKey key) hub.publishers)
        }` is not a public key and nothing but a public key. Write the line that is in the key's `.pub` file, as in `ssh-ed25519 AAAA...`.";
      }
    ]
    ++ lib.concatLists (mapAttrsToList perHost hub.hosts);

  hubModule = mkIf hub.enable {
    assertions = hubAssertions;
    environment = {
      etc."ekiben/hub.json".text = builtins.toJSON {
        inherit (hub) directory;
        hosts = mapAttrs (_: host: host.files) hub.hosts;
      };
      systemPackages = [ cfg.package ];
      # not for root, who would do what another user's files say
      extraInit = lib.optionalString (hub.repository != null) ''
        [ "$(id -u)" = 0 ] || export EKIBEN_FLEET=${lib.escapeShellArg hub.repository}
      '';
    };
    services.openssh = {
      enable = lib.mkDefault true;
      extraConfig = lib.mkOrder 5000 hubSshd;
    };
    security.pam.services = mkIf hubHasPam {
      ${hubPam}.text = ''
        auth required pam_deny.so
        account required pam_unix.so
        password required pam_deny.so
        session required pam_permit.so
      '';
    };
    users.groups = {
      ekiben-hosts = { };
      ${hubUser}.members = [ hub.user ];
      # who may publish, from here or from elsewhere
      ${hubPublisher}.members = [ hub.user ];
    }
    // forHosts (_: host: { gid = host.uid; });
    users.users =
      forHosts (
        name: host: {
          isSystemUser = true;
          inherit (host) uid;
          description = "Host ${name} of Ekiben's fleet";
          group = "fleet-${name}";
          extraGroups = [ "ekiben-hosts" ];
          home = "${hubHosts}/${name}";
          # no password, and yet not locked, which sshd without PAM takes for a refusal
          hashedPassword = "*";
          initialHashedPassword = mkIf config.systemd.sysusers.enable "*";
          openssh.authorizedKeys.keys = map (key: "restrict ${key}") (keysOf host);
        }
      )
      // optionalAttrs (hub.user == hubUser) {
        ${hubUser} = {
          isSystemUser = true;
          description = "Publisher of Ekiben's fleet";
          group = hubUser;
          home = "${hub.directory}/home";
        };
      }
      // optionalAttrs (hub.publishers != [ ]) {
        ${hubPublisher} = {
          isSystemUser = true;
          description = "Publishers of Ekiben's fleet, from elsewhere";
          group = hubPublisher;
          home = hub.directory;
          hashedPassword = "*";
          initialHashedPassword = mkIf config.systemd.sysusers.enable "*";
          openssh.authorizedKeys.keys = map (key: "restrict ${key}") hub.publishers;
        };
      };
    systemd = {
      mounts = map hubMount (builtins.attrNames hosts);
      services = {
        ekiben-hub-collect = hubCollect;
        ekiben-hub-files = hubFiles;
      };
      timers = {
        ekiben-hub-collect = hubTimer "Timer of the collection of reports" hub.reports.interval;
        # a file can be replaced in so many ways that whoever watches it misses one
        ekiben-hub-files = hubTimer "Timer of the files for hosts" "1min";
      };
      # sshd wants all that leads to a host's directory to be root's, and nobody else's to change
      tmpfiles.rules = [
        "d ${hub.directory} 0755 root root -"
        "d ${hub.directory}/received 0750 ${hub.user} ${hubPublisher} -"
        "d ${hubHosts} 0750 root ${hubPublisher} -"
      ]
      ++ lib.optional (hub.user == hubUser) "d ${hub.directory}/home 0700 ${hubUser} ${hubUser} -"
      ++ lib.concatMap (name: [
        "d ${hubHosts}/${name} 0755 root root -"
        "d ${hubHosts}/${name}/release 0775 ${hub.user} ${hubPublisher} -"
        # what root makes there gets the host's group
        "d ${hubHosts}/${name}/files 2750 root fleet-${name} -"
      ]) (builtins.attrNames hosts);
    };
  };

  # the program that this one replaces: its configuration works as it is
  predecessor = [
    "services"
    "patchouli-deployment"
  ];
  aliases =
    map
      (
        option:
        lib.mkAliasOptionModule (predecessor ++ option) (
          [
            "services"
            "ekiben"
          ]
          ++ option
        )
      )
      [
        [ "enable" ]
        [ "instances" ]
        [
          "webhook"
          "enable"
        ]
        [
          "webhook"
          "host"
        ]
        [
          "webhook"
          "port"
        ]
        [
          "webhook"
          "path"
        ]
        [
          "webhook"
          "projects"
        ]
      ];
in
{
  imports = aliases ++ [ { config = hubModule; } ];

  options.services.ekiben = {
    enable = mkEnableOption "Ekiben, which keeps this machine up to date from the inside";
    package = lib.mkPackageOption pkgs "ekiben" { };
    instances = mkOption {
      type = types.attrsOf instance;
      default = { };
      description = "What this machine deploys. The name becomes part of the units' names: `ekiben-<name>`.";
      example = literalExpression ''
        {
          web = {
            flakePath = "/var/nixos-config";
            user = "deploy";
            inputs = [ "my-project" ];
          };
        }
      '';
    };
    webhook = {
      enable = mkEnableOption "the webhook";
      host = mkOption {
        type = types.str;
        default = "127.0.0.1";
        example = "::1";
        description = "The address to listen on.";
      };
      port = mkOption {
        type = types.port;
        default = 8787;
        description = "The port to listen on.";
      };
      socket = mkOption {
        type = types.nullOr externalPath;
        default = null;
        example = "/run/ekiben.sock";
        description = "A Unix socket to listen on, for a proxy, instead of {option}`host` and {option}`port`.";
      };
      nginx = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "deploy.example.org";
        description = ''
          A virtual host of {option}`services.nginx` that passes requests on to the webhook, over a Unix
          socket. TLS is that virtual host's business.
        '';
      };
      caddy = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "deploy.example.org";
        description = "The same for {option}`services.caddy`.";
      };
      path = mkOption {
        type = types.strMatching "/[^?#%\" \\]*";
        default = "/ekiben";
        description = "The path of the URL.";
      };
      projects = mkOption {
        type = types.attrsOf project;
        default = { };
        description = "Who may start what: a token for each project that pushes here.";
        example = literalExpression ''
          {
            my-project = {
              tokenFile = "/run/secrets/my-project-token";
              instance = "web";
            };
          }
        '';
      };
    };
    fleet = {
      enable = mkEnableOption "this machine as a host of a fleet: it deploys what its hub publishes for it, as the instance `fleet`";
      name = mkOption {
        type = types.str;
        default = hostName;
        defaultText = literalExpression "config.networking.hostName";
        description = "This machine's name in the fleet.";
      };
      hub = mkOption {
        type = types.either server (types.nonEmptyListOf server);
        example = literalExpression ''
          {
            host = "hub.example.org";
            hostKey = "ssh-ed25519 AAAAC3...";
          }
        '';
        description = "The hub, or several with the same releases: the next one is asked where one does not answer.";
      };
      identityFile = mkOption {
        type = externalPath;
        default = "/var/lib/ekiben-identity/key";
        description = "The private SSH key to log in with. It is read by systemd, so it can be root's only.";
      };
      signers = mkOption {
        type = types.listOf types.singleLineStr;
        default = [ ];
        example = [ "ssh-ed25519 AAAAC3..." ];
        description = ''
          The public keys of those who may publish. If there are any, a release that none of them has
          signed is refused: who takes the hub over can then hold back, but not deploy.
        '';
      };
      sshOptions = mkOption {
        type = types.listOf types.singleLineStr;
        default = [ ];
        example = [ "ProxyJump=gate@example.org" ];
        description = "More options for {command}`sftp -o`, as in {manpage}`ssh_config(5)`. The host key stays pinned.";
      };
      user = mkOption {
        type = types.str;
        default = "ekiben-fleet";
        description = "The unprivileged user that fetches, evaluates and builds. The default one is made.";
      };
      dates = mkOption {
        type = types.nullOr types.str;
        default = "*:0/15";
        description = "When to ask the hub for something new, in the format of {manpage}`systemd.time(7)`; `null` for never.";
      };
      randomizedDelaySec = mkOption {
        type = types.str;
        default = "15min";
        description = "Delay each time by a random time of at most this, so that not all of a fleet come at once.";
      };
      fileDirectories = mkOption {
        type = types.listOf plainPath;
        default = [ "/var/lib/secrets" ];
        description = ''
          The directories below which the hub may put the files that it has for this host
          ({option}`services.ekiben.hub.hosts.<name>.files`). Where they are missing they are made, for root
          to write in. What a file holds is the hub's to say even where releases are signed.
        '';
      };
      selfUpdate = {
        enable = mkEnableOption "updates of flake inputs also where the hub has nothing new";
        inputs = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "nixpkgs" ];
          description = "The flake inputs to update; all if empty.";
        };
      };
      healthChecks = mkOption {
        type = types.attrsOf healthCheck;
        default = { };
        description = ''
          As {option}`services.ekiben.instances.<name>.healthChecks`. One more is always made: whether the
          hub can be reached.
        '';
      };
      inherit operation observe flags;
      reboot = {
        when = mkOption {
          type = types.enum [
            "never"
            "needed"
          ];
          default = "never";
          description = "Whether to reboot when kernel, kernel modules or initrd have changed, or the new system waits for it.";
        };
        window = mkOption {
          type = types.nullOr (
            types.submodule {
              options = {
                lower = timeOfDay "01:00" "The beginning.";
                upper = timeOfDay "05:00" "The end; may be after midnight.";
              };
            }
          );
          default = null;
          description = "The time of day in which to reboot; `null`: at any time.";
        };
        kexec = mkEnableOption "a reboot by {command}`systemctl kexec`, where that works";
      };
    };
    hub = {
      enable = mkEnableOption "the hub of a fleet, from which other machines fetch what they are to run";
      hosts = mkOption {
        type = types.attrsOf hubHost;
        default = { };
        example = literalExpression ''
          {
            web.publicKey = "ssh-ed25519 AAAAC3... root@web";
          }
        '';
        description = ''
          The machines of the fleet. Each logs in to this machine's sshd as the user `fleet-<name>`, and
          sees nothing but what is its own. The administrator's settings of sshd stay as they are, except
          that `AllowUsers` and `AllowGroups` do not count for these users; a `Match` block of the
          administrator's that applies to them, too, comes first.

          A machine that is taken away leaves its directory behind, without its files.
        '';
      };
      repository = mkOption {
        type = types.nullOr externalPath;
        default = null;
        example = "/var/fleet";
        description = ''
          The repository with the configurations of all hosts, for {command}`ekiben fleet` in other
          directories. It belongs to {option}`user`.
        '';
      };
      directory = mkOption {
        type = plainPath;
        default = "/var/lib/ekiben-hub";
        description = ''
          What the hub serves and has received. All that leads there has to belong to root, and
          to be writable by nobody else.
        '';
      };
      user = mkOption {
        type = types.str;
        default = hubUser;
        example = "alice";
        description = "Who may publish here, and see what hosts report: a user that is made for it, or one that is there.";
      };
      publishers = mkOption {
        type = types.listOf types.singleLineStr;
        default = [ ];
        example = [ "ssh-ed25519 AAAAC3... alice@desk" ];
        description = ''
          The keys of who may publish from other machines, and see there what hosts report: they log in as
          `ekiben-publisher`, and can do nothing but that. In the `fleet.json` of their repository, `directory`
          is `"sftp://ekiben-publisher@<this machine>"`, with `:<port>` if sshd has another one.
        '';
      };
      reports = {
        size = mkOption {
          type = types.strMatching "[1-9][0-9]*[kMG]";
          default = "8M";
          description = ''
            How much a host may leave before it is collected. It is kept in memory, so all hosts together
            can take this as many times as there are hosts, for as long as nothing is collected.
          '';
        };
        files = mkOption {
          type = types.ints.between 8 1000000;
          default = 128;
          description = "How many files a host may leave before they are collected.";
        };
        interval = mkOption {
          type = types.str;
          default = "30s";
          description = "How often to collect, in the format of {manpage}`systemd.time(7)`.";
        };
      };
    };
    settings = mkOption {
      type = types.attrs;
      internal = true;
      readOnly = true;
      default = settings;
      defaultText = "the configuration file, before it is checked";
      description = "What {file}`/etc/ekiben/config.json` holds.";
    };
  };

  config = lib.mkMerge [
    (mkIf cfg.fleet.enable {
      services.ekiben = {
        enable = lib.mkDefault true;
        instances.fleet = fleetInstance;
      };
      users = mkIf (cfg.fleet.user == "ekiben-fleet") {
        users.ekiben-fleet = {
          isSystemUser = true;
          group = "ekiben-fleet";
        };
        groups.ekiben-fleet = { };
      };
      systemd = {
        tmpfiles.rules = [
          "d /var/lib/ekiben/outbox 0755 root root -"
          "d /var/lib/ekiben/outbox/fleet 2750 root ${config.users.users.${cfg.fleet.user}.group} -"
          "d /var/lib/ekiben/files 0700 root root -"
        ]
        # one that is there stays as it is
        ++ map (directory: "d ${directory} :0711 :root :root -") cfg.fleet.fileDirectories;
        services = {
          ekiben-deliver = deliver;
          ekiben-files = mkIf hasFiles fleetFiles;
          ekiben-reboot = mkIf (cfg.fleet.reboot.when == "needed") reboot;
        };
        paths.ekiben-deliver = {
          description = "Reports for the fleet's hub";
          wantedBy = [ "paths.target" ];
          pathConfig.PathChanged = "/var/lib/ekiben/outbox/fleet";
        };
        paths.ekiben-files = mkIf hasFiles {
          description = "Files from the fleet's hub";
          wantedBy = [ "paths.target" ];
          # systemd has it come before its service, and that comes before all that units usually come after
          unitConfig.DefaultDependencies = false;
          conflicts = [ "shutdown.target" ];
          before = [ "shutdown.target" ];
          pathConfig.PathChanged = "/var/lib/ekiben/instances/fleet/files/index.json";
        };
        timers = mkIf (cfg.fleet.reboot.when == "needed") {
          ekiben-reboot = {
            description = "Time to look whether Ekiben needs a reboot";
            wantedBy = [ "timers.target" ];
            timerConfig = {
              OnBootSec = "5min";
              OnUnitInactiveSec = "5min";
            };
          };
        };
      };
    })
    (mkIf cfg.enable {
      inherit assertions warnings;
      services = mkIf cfg.webhook.enable {
        ekiben.webhook.socket = mkIf (cfg.webhook.nginx != null || cfg.webhook.caddy != null) (
          lib.mkDefault "/run/ekiben.sock"
        );
        nginx.virtualHosts = mkIf (cfg.webhook.nginx != null) {
          ${cfg.webhook.nginx}.locations."= ${cfg.webhook.path}" = {
            proxyPass = "http://unix:${cfg.webhook.socket}";
            # as in src/gate.rs
            extraConfig = "client_max_body_size 32m;";
          };
        };
        caddy.virtualHosts = mkIf (cfg.webhook.caddy != null) {
          ${cfg.webhook.caddy}.extraConfig = "reverse_proxy ${cfg.webhook.path} unix/${cfg.webhook.socket}";
        };
      };
      environment.etc."ekiben/config.json".source = checked;
      environment.systemPackages = [ cfg.package ];
      # a path that a power cut has left empty would be taken for whole
      nix.settings = mkIf knowsFsync { fsync-store-paths = lib.mkDefault true; };
      users.groups.ekiben = { };
      systemd = {
        paths =
          forInstances path cfg.instances
          // optionalAttrs cfg.webhook.enable { ekiben-webhook = webhookTokens; };
        timers = forInstances timer (filterAttrs (_: instance: instance.dates != null) cfg.instances);
        services =
          forInstances service cfg.instances
          // {
            ekiben = orphans;
            "ekiben-restart@" = restart;
          }
          // optionalAttrs cfg.webhook.enable {
            ekiben-webhook = webhookService;
            ekiben-webhook-address = webhookMove;
          };
        sockets = optionalAttrs cfg.webhook.enable { ekiben-webhook = webhookSocket; };
        # as in src/layout.rs
        tmpfiles.rules = [
          "d /var/lib/ekiben 0755 root root -"
          "d /var/lib/ekiben/queue 2770 root ekiben -"
          "d /var/lib/ekiben/runs 0700 root root -"
          "d /var/lib/ekiben/status 0755 root root -"
          "d /var/lib/ekiben/root 0755 root root -"
        ];
      };
    })
  ];
}
