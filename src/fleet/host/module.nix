# services.ekiben.fleet: this machine as a host of a fleet, which is the instance `fleet`.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib)
    literalExpression
    mkEnableOption
    mkIf
    mkOption
    types
    ;
  inherit (import ../../module/types.nix { inherit lib; })
    asDefaults
    build
    flags
    healthCheck
    manyOf
    observe
    operation
    orNull
    plainPath
    publicKey
    reboot
    rebootAliases
    signer
    unitPath
    ;
  inherit (import ../../module/sandbox.nix { inherit config lib pkgs; })
    networkSandbox
    nixPath
    offlineSandbox
    programs
    ;

  cfg = config.services.ekiben;
  inherit (cfg) fleet;
  ekiben = lib.getExe cfg.package;

  https = types.strMatching "https://[^[:space:]@?#]+";
  servers = lib.toList fleet.hub;
  stores = lib.filter (server: server.url != null) servers;

  server = types.submodule {
    options = {
      host =
        orNull types.str "hub.example.org"
          "Name or address of the hub's sshd; `null` if there is only a {option}`url`.";
      port = mkOption {
        type = types.port;
        default = 22;
        description = "The port of the hub's sshd.";
      };
      hostKey =
        orNull publicKey "ssh-ed25519 AAAAC3..."
          "The public host key of the hub. Nothing is fetched from a hub with another one.";
      user = mkOption {
        type = types.str;
        default = "fleet-${fleet.name}";
        defaultText = literalExpression ''"fleet-''${config.services.ekiben.fleet.name}"'';
        description = "The user to log in as.";
      };
      url = orNull https "https://releases.example.org" ''
        Where releases are fetched from by {command}`curl`, instead of over SFTP: any web server, store or network of
        caches that has `hosts/<name>/release/` of the hub's directory. Releases have to be signed
        ({option}`services.ekiben.fleet.signers`). Files for this host, and reports, need {option}`host` besides.
      '';
      reportsUrl = orNull https "https://hub.example.org" ''
        Where reports are sent to by `PUT`, below `hosts/<name>/reports/`, if there is no {option}`host`. Without
        either, the host is silent to its hub.
      '';
    };
  };

  # a fleet host is an instance whose repository is its own, and whose commits are the hub's releases
  fleetInstance = {
    inherit (fleet)
      user
      dates
      randomizedDelaySec
      operation
      observe
      reboot
      build
      flags
      ;
    flakePath = "/var/lib/ekiben/instances/fleet/repository";
    flakeRef = "/var/lib/ekiben/instances/fleet/repository#${fleet.name}";
    inherit (fleet.selfUpdate) inputs;
    healthChecks = fleet.healthChecks // {
      hub = {
        # as the system does that runs by then, with its key; the other way for one that has no such unit
        command = ''
          unit=ekiben-reach@$$.service
          systemctl start --quiet "$unit" && exit
          test $? != 5 || exec ${ekiben} reach fleet
          journalctl --sync
          journalctl --quiet --output=cat --identifier=ekiben --identifier="(ekiben)" --unit="$unit" >&2
          exit 1
        '';
        timeout = 40;
        retries = 2;
        remote = true;
      };
    };
  };

  credentials = {
    LoadCredential = [
      "identity:${fleet.identityFile}"
    ]
    ++ lib.optional (fleet.netrcFile != null) "netrc:${fleet.netrcFile}";
    # where one of them is missing, which the program then says, or the server
    SetCredential = [ "identity:\\n" ] ++ lib.optional (fleet.netrcFile != null) "netrc:\\n";
  };

  assertions = [
    {
      assertion = lib.all (
        server: server.host != null && server.hostKey != null || server.url != null
      ) servers;
      message = "`services.ekiben.fleet.hub` must have `host` and `hostKey`, or `url`.";
    }
    {
      assertion = lib.all (server: (server.host == null) == (server.hostKey == null)) servers;
      message = "`services.ekiben.fleet.hub` must have both `host` and `hostKey`, or neither.";
    }
    {
      assertion = lib.length stores <= 1;
      message = "`services.ekiben.fleet.hub` must not have `url` more than once: have that name lead to all of them.";
    }
    {
      assertion = stores != [ ] -> fleet.signers != [ ];
      message = "`services.ekiben.fleet.signers` must not be empty with `hub.url`: or who has the store decides what this machine runs.";
    }
    {
      assertion = lib.all (
        server:
        server.reportsUrl != null -> server.url != null && lib.all (server: server.host == null) servers
      ) servers;
      message = "`services.ekiben.fleet.hub.reportsUrl` must be beside `url`, and without `host`, where reports go otherwise.";
    }
  ];

  # The files that the hub has for this host. As what manages secrets does: in a switch and at boot before
  # all other units, when the users are there; also whenever the hub has something new.
  hasFiles = fleet.fileDirectories != [ ];
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
      RequiresMountsFor = [ "/var/lib/ekiben" ] ++ fleet.fileDirectories;
    };
    startLimitIntervalSec = 0;
    serviceConfig = offlineSandbox // {
      # what somebody has removed since the boot; the sandbox is made of what there is then
      ExecStartPre = "-+${lib.getExe' config.systemd.package "systemd-tmpfiles"} --create ${
        lib.concatMapStringsSep " " (directory: "--prefix=${directory}") fleet.fileDirectories
      }";
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
      ++ map (directory: "-${directory}") fleet.fileDirectories;
      SystemCallFilter = offlineSandbox.SystemCallFilter ++ [ "@chown" ];
    };
  };

  # a run's report; what cannot be delivered now waits for the next poll
  deliver = {
    description = "Delivery of reports to the fleet's hub";
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    startLimitIntervalSec = 0;
    path = programs;
    environment = config.networking.proxy.envVars;
    serviceConfig =
      networkSandbox
      // credentials
      // {
        Type = "oneshot";
        ExecStart = "${ekiben} deliver fleet";
        TimeoutStartSec = "10min";
        User = fleet.user;
        StateDirectory = "ekiben/instances/fleet";
        StateDirectoryMode = "0700";
      };
  };

  # the hub's health check: one for each time, which leaves no unit behind
  reach = deliver // {
    description = "Look whether the fleet's hub has a release for this host";
    restartIfChanged = false;
    unitConfig.CollectMode = "inactive-or-failed";
    serviceConfig = deliver.serviceConfig // {
      ExecStart = "${ekiben} reach fleet";
      SyslogIdentifier = "ekiben";
      TimeoutStartSec = "40s";
    };
  };

  # before each look: whether what was deployed still is well. Root's, as what a run does after the switch, with which it
  # shares the health checks. A unit of its own is half the price of a process of a unit with a sandbox.
  watch = {
    description = "Look whether what Ekiben's instance fleet has deployed is well";
    restartIfChanged = false;
    startLimitIntervalSec = 0;
    inherit (config.systemd.services.ekiben-fleet) path;
    environment = removeAttrs config.systemd.services.ekiben-fleet.environment [ "PATH" ];
    serviceConfig = {
      Type = "oneshot";
      ExecStart = "-${ekiben} watch fleet";
      SyslogIdentifier = "ekiben";
      TimeoutStartSec = "5min";
      LogLevelMax = "warning";
    };
  };
in
{
  imports = rebootAliases [
    "services"
    "ekiben"
    "fleet"
  ];

  options.services.ekiben.fleet = {
    enable = mkEnableOption "this machine as a host of a fleet: it deploys what its hub publishes for it, as the instance `fleet`";
    name = mkOption {
      type = types.str;
      default = config.networking.hostName;
      defaultText = literalExpression "config.networking.hostName";
      description = "This machine's name in the fleet.";
    };
    hub = mkOption {
      # with the options of a server, which `either` does not show by itself
      type = types.either server (types.nonEmptyListOf server) // {
        inherit (server) getSubOptions;
      };
      example = literalExpression ''
        {
          host = "hub.example.org";
          hostKey = "ssh-ed25519 AAAAC3...";
        }
      '';
      description = ''
        The hub, or several with the same releases: if one does not answer, the next one is asked. One of them can have a
        {option}`url`, from which releases then come.
      '';
    };
    netrcFile = orNull unitPath "/root/ekiben-netrc" ''
      A file with the passwords for {option}`services.ekiben.fleet.hub.url` and `reportsUrl`, as in
      {manpage}`netrc(5)`: `machine releases.example.org login web password …`. It is read by systemd, so it can be
      readable by root only.
    '';
    identityFile = mkOption {
      type = unitPath;
      default = "/var/lib/ekiben-identity/key";
      description = "The private SSH key to log in with. It is read by systemd, so it can be readable by root only.";
    };
    signers = manyOf signer [ "ssh-ed25519 AAAAC3..." ] ''
      The public keys of the publishers, with options as in {manpage}`ssh-keygen(1)`. If not empty, only releases that one of them has signed are
      accepted: a hub that is taken over can withhold releases, but not make them.
    '';
    sshOptions = manyOf types.singleLineStr [
      "ProxyJump=gate@example.org"
    ] "More options for {command}`ssh -o`, as in {manpage}`ssh_config(5)`. The host key stays pinned.";
    user = mkOption {
      type = types.str;
      default = "ekiben-fleet";
      description = "The unprivileged user that fetches, evaluates and builds. The default one is created.";
    };
    dates = mkOption {
      type = types.nullOr types.str;
      default = "*:0/15";
      description = "When to ask the hub for something new, in the format of {manpage}`systemd.time(7)`; `null` for never.";
    };
    randomizedDelaySec = mkOption {
      type = types.str;
      default = "15min";
      description = "Delay each poll by a random time of up to this, so that the hosts of a fleet do not come at once.";
    };
    fileDirectories = mkOption {
      type = types.listOf plainPath;
      default = [ "/var/lib/secrets" ];
      description = ''
        The directories below which the hub may install files for this host
        ({option}`services.ekiben.hub.hosts.<name>.files`). Missing ones are created, writable by
        root only. These files are not signed, even where releases are.
      '';
    };
    selfUpdate = {
      enable = mkEnableOption "updates of flake inputs also where the hub has nothing new";
      inputs = manyOf types.str [ "nixpkgs" ] "The flake inputs to update; all if empty.";
    };
    healthChecks = mkOption {
      type = types.attrsOf healthCheck;
      default = { };
      description = ''
        As {option}`services.ekiben.instances.<name>.healthChecks`. There is always one more: whether the
        new system still gets its releases from the hub.
      '';
    };
    inherit
      operation
      observe
      reboot
      build
      flags
      ;
  };

  config = mkIf fleet.enable {
    services.ekiben = {
      enable = lib.mkDefault true;
      instances.fleet = fleetInstance;
      settings.instances.fleet.hub = asDefaults (
        {
          inherit (fleet)
            fileDirectories
            name
            signers
            sshOptions
            ;
          servers = map (
            server:
            removeAttrs server [
              "url"
              "reportsUrl"
            ]
          ) (lib.filter (server: server.host != null) servers);
          selfUpdate = fleet.selfUpdate.enable;
        }
        // lib.optionalAttrs (stores != [ ]) { inherit (lib.head stores) url reportsUrl; }
      );
    };
    inherit assertions;
    users = mkIf (fleet.user == "ekiben-fleet") {
      users.ekiben-fleet = {
        isSystemUser = true;
        group = "ekiben-fleet";
      };
      groups.ekiben-fleet = { };
    };
    systemd = {
      tmpfiles.rules = [
        "d /var/lib/ekiben/outbox 0755 root root -"
        "d /var/lib/ekiben/outbox/fleet 2750 root ${config.users.users.${fleet.user}.group} -"
        # when another user has become the instance's
        "Z /var/lib/ekiben/outbox/fleet - root ${config.users.users.${fleet.user}.group} -"
        "d /var/lib/ekiben/files 0711 root root -"
      ]
      # one that is there stays as it is
      ++ map (directory: "d ${directory} :0711 :root :root -") fleet.fileDirectories;
      services = {
        ekiben-deliver = deliver;
        ekiben-fleet = mkIf cfg.enable {
          environment = nixPath;
          serviceConfig = credentials;
        };
        # what the hub is told of
        "ekiben-look@fleet" = mkIf cfg.enable {
          wants = [ "ekiben-watch@fleet.service" ];
          after = [ "ekiben-watch@fleet.service" ];
        };
        "ekiben-reach@" = mkIf cfg.enable reach;
        "ekiben-watch@fleet" = mkIf cfg.enable watch;
        # its health check asks the hub, where the system that waits for it has no unit for that
        ekiben-boot = mkIf cfg.enable {
          serviceConfig = credentials // {
            User = fleet.user;
          };
        };
        ekiben-files = mkIf hasFiles fleetFiles;
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
    };
  };
}
