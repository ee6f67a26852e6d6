# services.ekiben.instances: what this machine deploys, and the units that do it.
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
    mkIf
    mkOption
    nameValuePair
    types
    ;
  inherit (import ../module/types.nix { inherit lib; })
    asDefaults
    build
    externalPath
    flags
    healthCheck
    isName
    manyOf
    observe
    operation
    orNull
    ownFile
    reboot
    rebootAliases
    seconds
    signer
    whether
    ;
  inherit (import ../module/sandbox.nix { inherit config lib pkgs; })
    asRoot
    bootEnvironment
    growingPauses
    insistent
    networkSandbox
    offlineSandbox
    programs
    ;

  cfg = config.services.ekiben;
  inherit (cfg) instances;
  ekiben = lib.getExe cfg.package;
  hostName = config.networking.hostName;
  loader = config.boot.loader;
  # of several disks, it is not known which one is booted; a GRUB that NixOS does not install has its files elsewhere
  grubBootsOnce =
    let
      inherit (loader.grub) efiSupport enable mirroredBoots;
    in
    enable
    && map (boot: boot.path) mirroredBoots == [ "/boot" ]
    && (efiSupport || lib.concatMap (boot: boot.devices) mirroredBoots != [ "nodev" ]);
  projects = lib.optionals cfg.webhook.enable (builtins.attrValues cfg.webhook.projects);
  reserved = lib.splitString "\n" (lib.fileContents ../reserved-names);

  # without needless slashes
  tidy =
    path:
    "/"
    + concatStringsSep "/" (lib.filter (part: part != "" && part != ".") (lib.splitString "/" path));

  instance = types.submodule (
    { config, ... }:
    {
      imports = rebootAliases [ ];
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
            The unprivileged user who owns the repository. Fetching, evaluating and building are done as
            this user, with the SSH keys, {file}`.netrc` and git configuration of its home.
          '';
        };
        inputs = mkOption {
          type = types.nullOr (types.listOf types.str);
          default = [ ];
          example = [ "my-project" ];
          description = ''
            The flake inputs to update; all of them if empty, none if `null`. `app/nixpkgs` names an input of
            an input; of an input that follows another one, that one is updated. A run fails if any other
            input would change.
          '';
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
        persistent = whether true "Whether to catch up on a run that was due while the machine was off.";
        randomizedDelaySec = mkOption {
          type = types.str;
          default = "0";
          example = "45min";
          description = "Delay each run of the timer by a random time of up to this.";
        };
        fixedRandomDelay = whether false "Whether {option}`randomizedDelaySec` leads to the same delay every time.";
        inherit build operation flags;
        pull = whether false ''
          Whether to start from the upstream of the branch that is checked out, if that is ahead.
          A branch and an upstream that both have commits of their own are an error.
        '';
        signers = manyOf signer [ "ssh-ed25519 AAAAC3..." ] ''
          SSH public keys, with options as in {manpage}`ssh-keygen(1)` such as `cert-authority` or
          `valid-before`. If not empty, a commit is deployed only if it is signed by one of them
          ({command}`git commit -S`), or is the one that has been deployed. A key with `valid-before` counts
          until then, whatever time a commit says that it is from. Updates of
          {file}`flake.lock` are commits of Ekiben's own on top of such a one. Others are refused
          before anything of them is evaluated. This is for a repository or an upstream that others
          may write to, such as a forge that is taken over. It does not protect from {option}`user`,
          nor from what the inputs become.
        '';
        push = whether false "Whether to push to the upstream what has been deployed. Nothing is ever forced.";
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
            Checks of a new system. A check counts only if it passed before the switch; if it fails after
            it, the old system is put back.
          '';
        };
        onUnitFailure = mkOption {
          type = types.enum [
            "rollback"
            "keep"
          ];
          default = "rollback";
          description = ''
            What to do if a unit fails in the switch that had not failed before, or cannot be started or
            reloaded: roll back, or keep the new system and report a warning.
          '';
        };
        rollback = whether true ''
          Whether to roll back to the old system if the new one fails. If not, the new one keeps running,
          but the old one may still be the one to boot.
        '';
        inherit observe reboot;
        networkRetries = mkOption {
          type = types.ints.unsigned;
          default = 5;
          description = "How often to retry a fetch if the network fails, after 1 s, 2 s, 4 s and so on.";
        };
        notify = {
          command =
            orNull types.lines "curl -fsS -d \"$EKIBEN_MESSAGE\" https://ntfy.example.org/my-machines"
              ''
                A shell command that tells somebody how a run has ended. It runs as {option}`user`, in the same sandbox and
                with the programs of the running system, and gets the run as JSON on its standard input and the main facts
                in `EKIBEN_TITLE`, `EKIBEN_MESSAGE`, `EKIBEN_RESULT` and others: see {file}`src/run/README.md`. One that
                fails is tried again up to four times, and changes nothing else.
              '';
          on = mkOption {
            type = types.enum [
              "failure"
              "change"
              "always"
            ];
            default = "failure";
            description = ''
              What is told: what has failed or was rolled back, and the first success after it; the same and what has been
              deployed; or every run. The same failure again, of a run that nobody has asked for, is told only with `always`.
            '';
          };
        };
        timeouts = mkOption {
          type = types.submodule {
            options = {
              prepare = seconds 1800 "For fetching all inputs, in seconds.";
              build = seconds 14400 "For evaluating and building, in seconds.";
              activate = seconds 1800 "For one activation, in seconds: of the new system, and of the old one if it is put back.";
            };
          };
          default = { };
          description = "How long the stages of a run may take.";
        };
        extraPackages =
          manyOf types.package (literalExpression "[ pkgs.git-crypt ]")
            "More programs for {option}`user`'s stages, such as the repository's git filters.";
      };
    }
  );

  withConfiguration = ref: if lib.hasInfix "#" ref then ref else "${ref}#${hostName}";

  # what systemd would not understand, and then never start, fails here
  checkedTimes =
    let
      expect =
        name: option: kind: value:
        lib.escapeShellArgs [
          "expect"
          "instances.${name}.${option}"
          kind
          value
        ];
      ofInstance =
        name: instance:
        lib.optionals (instance.dates != null) [
          (expect name "dates" "calendar" instance.dates)
          (expect name "randomizedDelaySec" "timespan" instance.randomizedDelaySec)
        ];
    in
    pkgs.runCommand "ekiben-times" { } ''
      expect() {
          # the time zone by itself: there are none here
          [ -f ${pkgs.tzdata}/share/zoneinfo/"''${3##* }" ] && time=''${3% *} || time=$3
          ${lib.getExe' config.systemd.package "systemd-analyze"} "$2" "$time" > /dev/null ||
              { echo "\`services.ekiben.$1\` must be as in systemd.time(7), not \`$3\`."; exit 1; }
      }
      ${lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) (
        concatStringsSep "\n" (lib.concatLists (mapAttrsToList ofInstance instances))
      )}
      touch $out
    '';

  # one for the machine: which instance's policy it is that counts, the program finds out
  mayReboot = lib.any (instance: instance.reboot.when == "needed") (builtins.attrValues instances);
  rebootService = {
    description = "Reboot into what Ekiben has deployed, if it takes one";
    after = [ "ekiben-boot.service" ];
    restartIfChanged = false;
    unitConfig.X-StopOnRemoval = false;
    path = programs;
    environment = bootEnvironment;
    serviceConfig = {
      Type = "oneshot";
      ExecStart = "${ekiben} reboot";
    };
  };
  rebootTimer = {
    description = "Time to look whether Ekiben needs a reboot";
    wantedBy = [ "timers.target" ];
    timerConfig = {
      OnBootSec = "5min";
      OnUnitInactiveSec = "5min";
    };
  };

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

  path = name: _: {
    description = "Requests for Ekiben's instance ${name}";
    wantedBy = [ "paths.target" ];
    unitConfig = insistent;
    # each takes one of the few inotify instances that root has; not a run that was cut off: this would start another
    # one while that is being ended
    pathConfig.PathExists = [
      "/var/lib/ekiben/queue/${name}"
      "/var/lib/ekiben/rollbacks/${name}"
    ];
  };

  timer = name: instance: {
    description = "Timer of Ekiben's instance ${name}";
    wantedBy = [ "timers.target" ];
    timerConfig = {
      # whoever wants to be told of every run gets one
      Unit = mkIf (instance.notify.on != "always") (lib.mkDefault "ekiben-look@${name}.service");
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

  # the longest that a boot and its judgement may take
  mostOfBoot = _: instance: 3600 + instance.timeouts.activate * 2 + instance.observe * 2;

  # what has waited for a boot is judged, and then only deployed
  boot = {
    description = "Judgement of what Ekiben has had waiting for a boot";
    wantedBy = [ "multi-user.target" ];
    # not only what it starts is to be there, but all of it
    after = [
      "multi-user.target"
      "network-online.target"
    ];
    wants = [ "network-online.target" ];
    # with boot counting, one that fails is no good boot
    requiredBy = [ "boot-complete.target" ];
    before = [ "boot-complete.target" ];
    restartIfChanged = false;
    unitConfig = {
      # all runs wait for this, but not for ever where the machine never comes up altogether: then the next one judges
      JobTimeoutSec = "${toString (lib.foldl' lib.max 0 (mapAttrsToList mostOfBoot instances))}s";
      X-StopOnRemoval = false;
    };
    path = programs;
    # a push is part of the end
    environment = config.networking.proxy.envVars // bootEnvironment;
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      ExecStart = "+${ekiben} boot";
      # what is to be booted once is not, if somebody has switched by hand since
      ExecStop = "+${ekiben} give-way";
      Restart = "on-abnormal";
      SyslogIdentifier = "ekiben";
    };
  };

  # with each change of a status, by the program; and when a timer has looked, or a request or a hold comes or goes
  metricsPath = {
    description = "Requests and holds of Ekiben's instances, for its metrics";
    wantedBy = [ "paths.target" ];
    unitConfig = insistent;
    pathConfig.PathChanged = [
      "/var/lib/ekiben/holds"
      "/var/lib/ekiben/looks"
      "/var/lib/ekiben/queue"
    ];
  };
  metrics = {
    description = "Metrics of Ekiben's instances";
    wantedBy = [ "multi-user.target" ];
    startLimitIntervalSec = 0;
    serviceConfig = offlineSandbox // {
      ExecStart = "${ekiben} metrics ${cfg.metrics}";
      ReadWritePaths = dirOf cfg.metrics;
      # how often it runs is of no interest
      LogLevelMax = "warning";
      SyslogIdentifier = "ekiben";
    };
  };

  # while there are holds
  holdsPath = {
    description = "Holds of Ekiben's instances";
    wantedBy = [ "paths.target" ];
    unitConfig = insistent;
    pathConfig.DirectoryNotEmpty = "/var/lib/ekiben/holds";
  };
  holds = {
    description = "End of holds of Ekiben's instances";
    startLimitIntervalSec = 0;
    serviceConfig =
      offlineSandbox
      // growingPauses "1s" "10s"
      // {
        Type = "exec";
        ExecStart = "${ekiben} holds";
        Restart = "on-failure";
        # may write these, and nothing else
        ReadWritePaths = [
          "/var/lib/ekiben/holds"
          "/var/lib/ekiben/queue"
        ];
        MemoryMax = "32M";
        TasksMax = 8;
      };
  };

  # what was cut off and has not gone on by itself; a run whose switch removed its instance has no unit any more
  orphans = {
    description = "End of Ekiben's runs that were cut off";
    wantedBy = [ "multi-user.target" ];
    after = [
      "ekiben-boot.service"
      "multi-user.target"
    ];
    unitConfig.ConditionDirectoryNotEmpty = "/var/lib/ekiben/runs";
    restartIfChanged = false;
    path = programs;
    # a push is part of the end
    environment = config.networking.proxy.envVars // bootEnvironment;
    serviceConfig = {
      # a switch that starts this must not wait for it: this waits for the switch
      Type = "exec";
      ExecStart = "${ekiben} conclude";
    };
  };

  # a run that could not begin leaves its unit failed until there is another
  retry = {
    description = "Another try to begin a run of Ekiben's instance %i";
    restartIfChanged = false;
    startLimitIntervalSec = 0;
    path = [ config.systemd.package ];
    serviceConfig = {
      Type = "oneshot";
      # where the program is gone, all fail at once: the next start of the run waits for this, but never for ever
      ExecStart = "/bin/sh -c '${ekiben} retry %i || sleep 20'";
      TimeoutStartSec = "infinity";
      # of the other unit, all is said
      LogLevelMax = "crit";
    };
  };
  # of another name, an assertion says what it is
  helper = kind: name: lib.optional (isName name) "ekiben-${kind}@${name}.service";

  # the run knows that it is the timer's; nor may that be told for another's
  due = {
    description = "A run of Ekiben's instance %i that is due";
    restartIfChanged = false;
    # until it has succeeded
    startLimitIntervalSec = 0;
    path = [ config.systemd.package ];
    serviceConfig = {
      Type = "oneshot";
      # a look that has failed has done its work
      ExecStartPre = "-${lib.getExe' config.systemd.package "systemctl"} reset-failed ekiben-look@%i.service";
      ExecStart = "${ekiben} due %i";
      Restart = "on-failure";
      # what the run says is enough, if there is one
      LogLevelMax = "warning";
    }
    // growingPauses "1s" "10s";
  };

  # a look has found something; or a request waits, which the look may not see, and whose path unit may be dead
  found = due // {
    description = "A run of Ekiben's instance %i that has something to do";
    unitConfig = {
      ConditionFileNotEmpty = "|/var/lib/ekiben/instances/%i/found";
      ConditionPathExists = [
        "|/var/lib/ekiben/queue/%i"
        "|/var/lib/ekiben/rollbacks/%i"
      ];
    };
    serviceConfig = removeAttrs due.serviceConfig [ "ExecStartPre" ];
  };

  service = name: instance: {
    description = "Deployment by Ekiben's instance ${name}";
    wants = [ "network-online.target" ];
    # nor does a request start it before another try has
    after = [
      "network-online.target"
      "ekiben-boot.service"
    ]
    ++ lib.concatMap (kind: helper kind name) [
      "retry"
      "due"
      "found"
    ];
    onFailure = helper "retry" name;
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
      // bootEnvironment
      // {
        # the home is read-only
        XDG_CACHE_HOME = "/var/cache/ekiben/${name}";
      };
    serviceConfig = networkSandbox // {
      Type = "oneshot";
      ExecStart = [
        "${asRoot} begin ${name}"
        "${ekiben} prepare ${name}"
        "${ekiben} build ${name}"
        "${asRoot} activate ${name}"
      ];
      # whatever happened; does nothing if activate has done it
      ExecStopPost = "${asRoot} conclude ${name}";
      SyslogIdentifier = "ekiben";
      # the stages have limits of their own, which add up to less; a run may have to wait for another's
      TimeoutStartSec = "${toString (2 * longest instance)}s";
      # for what ignores that it is to end; conclude takes its own time
      TimeoutStopSec = "30s";
      NotifyAccess = "exec";
      User = instance.user;
      # how far it is, and what it waits for; systemd hears the stage itself alone
      BindReadOnlyPaths = networkSandbox.BindReadOnlyPaths ++ [ "/run/systemd/notify" ];
      StateDirectory = "ekiben/instances/${name}";
      StateDirectoryMode = "0700";
      CacheDirectory = "ekiben/${name}";
      CacheDirectoryMode = "0700";
      ReadWritePaths = [ "-${instance.flakePath}" ];
    };
  };

  # What a timer starts: one process of the user's, in the run's own sandbox, which finds out whether a run would have
  # anything to do. It may not write to the repository. Unless it is sure that there is nothing, there is a run.
  look = name: _: {
    description = "Look whether Ekiben's instance ${name} has anything to do";
    wants = [ "network-online.target" ];
    after = [
      "network-online.target"
      "ekiben-boot.service"
    ];
    onFailure = helper "due" name;
    onSuccess = helper "found" name;
    restartIfChanged = false;
    startLimitIntervalSec = 0;
    inherit (config.systemd.services."ekiben-${name}") path;
    environment = removeAttrs config.systemd.services."ekiben-${name}".environment [ "PATH" ];
    serviceConfig =
      removeAttrs config.systemd.services."ekiben-${name}".serviceConfig [
        "ExecStopPost"
        "NotifyAccess"
        "TimeoutStopSec"
      ]
      // {
        ExecStart = "${ekiben} look ${name}";
        ReadWritePaths = "-/var/lib/ekiben/looks/${name}";
        TimeoutStartSec = "5min";
        # what there is to say, the run says
        LogLevelMax = "crit";
      };
  };

  # one for each run: it ends by itself
  notify = name: instance: {
    description = "Notification of a run of Ekiben's instance ${name}";
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    restartIfChanged = false;
    unitConfig = {
      CollectMode = "inactive-or-failed";
      X-StopOnRemoval = false;
    };
    path = programs ++ instance.extraPackages ++ [ "/run/current-system/sw" ];
    environment = config.networking.proxy.envVars;
    serviceConfig = networkSandbox // {
      Type = "oneshot";
      ExecStart = "${ekiben} notify ${name} %i ${instance.notify.on} ${utils.escapeSystemdExecArg instance.notify.command}";
      ExecStopPost = "+${ekiben} notified ${name} %i ${instance.notify.on}";
      SyslogIdentifier = "ekiben";
      # five attempts
      TimeoutStartSec = "40min";
      User = instance.user;
    };
  };

  # NixOS refuses settings that its Nix does not know
  knowsFsync =
    config.nix.enable
    && lib.getName config.nix.package == "nix"
    && lib.versionAtLeast (lib.getVersion config.nix.package) "2.25";

  forInstances =
    function: mapAttrs' (name: instance: nameValuePair "ekiben-${name}" (function name instance));

  assertionsOf = name: instance: [
    {
      assertion = isName name && !lib.elem name reserved;
      message = "`services.ekiben.instances.${name}` must be named by letters, digits, `_` and `-`, and other than ${concatStringsSep ", " reserved}.";
    }
    {
      assertion = config.users.users ? ${instance.user};
      message = "`services.ekiben.instances.${name}.user`: user `${instance.user}` does not exist; set `users.users.${instance.user}.isNormalUser = true;`.";
    }
    {
      assertion = lib.all (check: check.command != null || check.units != [ ]) (
        builtins.attrValues instance.healthChecks
      );
      message = "`services.ekiben.instances.${name}.healthChecks` must each have a `command` or `units`.";
    }
    {
      assertion = instance.user != "root";
      message = "`services.ekiben.instances.${name}.user` must not be `root`.";
    }
    {
      assertion = !lib.elem ".." (lib.splitString "/" instance.flakePath);
      message = "`services.ekiben.instances.${name}.flakePath` must not contain `..`.";
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
      message = "`services.ekiben.instances.${name}.flakePath` must not be `${instance.flakePath}`: use a directory of its own that outlives a boot, such as `/var/nixos-config`.";
    }
    {
      assertion =
        let
          home = config.users.users.${instance.user}.home or "/var/empty";
        in
        instance.user == "root" || !hasPrefix "${instance.flakePath}/" "${home}/";
      message = "`services.ekiben.instances.${name}.flakePath` must not be the home of `${instance.user}`: use a directory in it.";
    }
    {
      assertion = isAllowed "allowed-users" instance.user || isAllowed "trusted-users" instance.user;
      message = "`nix.settings.allowed-users` must contain `${instance.user}`, the user of `services.ekiben.instances.${name}`.";
    }
    {
      assertion = lib.all (unit: lib.hasInfix "." unit) (
        lib.concatMap (check: check.units) (builtins.attrValues instance.healthChecks)
      );
      message = "`services.ekiben.instances.${name}.healthChecks` must name units in full, such as `postgresql.service`.";
    }
    {
      assertion =
        let
          reference = builtins.head (builtins.match "([^#?]*).*" instance.flakeRef);
          directory = lib.removePrefix "git+file://" (lib.removePrefix "path:" reference);
        in
        directory == instance.flakePath || hasPrefix "${instance.flakePath}/" directory;
      message = "`services.ekiben.instances.${name}.flakeRef` must be below `${instance.flakePath}`, not `${instance.flakeRef}`.";
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
  warningsOf =
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
        "`users.users.${instance.user}` should not be in group `${builtins.head mighty}`, whose members can become root: it evaluates `services.ekiben.instances.${name}`."
    ++ lib.optional (isAllowed "trusted-users" instance.user) "`nix.settings.trusted-users` should not contain `${instance.user}`: trusted users can become root.";
in
{
  options.services.ekiben.metrics = mkOption {
    type = types.nullOr ownFile;
    default = null;
    example = "/var/lib/node-exporter/ekiben.prom";
    description = ''
      A file for the textfile collector of Prometheus' node exporter, which has to be told its directory
      (`--collector.textfile.directory`). It is replaced whenever something changes; {file}`src/run/README.md` says what is
      in it, and has rules for alerts.
    '';
  };
  options.services.ekiben.instances = mkOption {
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

  config = mkIf cfg.enable {
    assertions = lib.concatLists (mapAttrsToList assertionsOf instances) ++ [
      {
        assertion = config.system.switch.enable or true;
        message = "`system.switch.enable` must be `true`: Ekiben switches this system.";
      }
      {
        assertion = instances != { } -> config.nix.enable;
        message = "`nix.enable` must be `true`: Ekiben builds this system.";
      }
      {
        assertion = config.security.allowUserNamespaces or true;
        message = "`security.allowUserNamespaces` must be `true`: Ekiben's sandbox is made of them.";
      }
    ];
    warnings =
      lib.concatLists (mapAttrsToList warningsOf instances)
      ++ lib.optional (instances == { }) "`services.ekiben.instances` is empty: nothing is ever deployed."
      ++ lib.optional config.system.autoUpgrade.enable "`system.autoUpgrade.enable` should be `false` beside `services.ekiben`: each undoes what the other has deployed.";
    # what may be able to boot a system once
    services.ekiben.settings.bootLoader =
      if loader.systemd-boot.enable then
        lib.mkDefault "systemd-boot"
      else
        lib.mkIf grubBootsOnce (lib.mkDefault "grub");
    services.ekiben.settings.instances = mapAttrs (
      _: instance:
      asDefaults (
        removeAttrs instance [
          "allowReboot"
          "dates"
          "extraPackages"
          "fixedRandomDelay"
          "notify"
          "persistent"
          "randomizedDelaySec"
          "rebootWindow"
        ]
        // {
          flakeRef = withConfiguration instance.flakeRef;
        }
      )
    ) instances;
    system.checks = [ checkedTimes ];
    systemd.tmpfiles.rules =
      lib.optional (cfg.metrics != null) "d ${dirOf cfg.metrics} 0755 root root -"
      ++ mapAttrsToList (
        name: instance: "f /var/lib/ekiben/looks/${name} 0644 ${instance.user} root -"
      ) instances
      ++ mapAttrsToList (name: _: "r /var/lib/ekiben/status/${name}.untold") (
        filterAttrs (_: instance: instance.notify.command == null) instances
      );
    nix.settings = lib.mkMerge [
      # a path that a power cut has left empty would be taken for whole
      (mkIf knowsFsync { fsync-store-paths = lib.mkDefault true; })
      # else what is asked for too early is not asked for again for an hour, and what is imported is built
      (mkIf (lib.any (instance: instance.build == "substitute") (builtins.attrValues instances)) {
        always-allow-substitutes = lib.mkDefault true;
        narinfo-cache-negative-ttl = lib.mkDefault 0;
      })
    ];
    systemd = {
      paths = forInstances path instances // {
        ekiben-holds = holdsPath;
        ekiben-metrics = mkIf (cfg.metrics != null) metricsPath;
      };
      timers = forInstances timer (filterAttrs (_: instance: instance.dates != null) instances) // {
        ekiben-reboot = mkIf mayReboot rebootTimer;
      };
      services =
        forInstances service instances
        // mapAttrs' (name: instance: nameValuePair "ekiben-look@${name}" (look name instance)) instances
        // mapAttrs' (name: instance: nameValuePair "ekiben-notify-${name}@" (notify name instance)) (
          filterAttrs (_: instance: instance.notify.command != null) instances
        )
        // {
          ekiben = orphans;
          ekiben-boot = boot;
          ekiben-holds = holds;
          ekiben-metrics = mkIf (cfg.metrics != null) metrics;
          ekiben-reboot = mkIf mayReboot rebootService;
          "ekiben-restart@" = restart;
          "ekiben-due@" = due;
          "ekiben-found@" = found;
          "ekiben-retry@" = retry;
        };
    };
  };
}
