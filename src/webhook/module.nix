# services.ekiben.webhook: the listener, its socket and its tokens.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib)
    concatStringsSep
    filterAttrs
    hasPrefix
    literalExpression
    mapAttrsToList
    mkEnableOption
    mkIf
    mkOption
    nameValuePair
    types
    ;
  inherit (import ../module/types.nix { inherit lib; })
    asDefaults
    isName
    orNull
    unitPath
    ;
  inherit (import ../module/sandbox.nix { inherit config lib pkgs; })
    growingPauses
    insistent
    offlineSandbox
    sandbox
    ;

  cfg = config.services.ekiben;
  inherit (cfg) instances webhook;
  inherit (webhook) projects;
  ekiben = lib.getExe cfg.package;

  project = types.submodule {
    options = {
      tokenFile = mkOption {
        type = unitPath;
        example = literalExpression ''config.age.secrets."my-project-token".path'';
        description = ''
          A file with the bearer token of this project: at least 16 letters, digits and `-._~+/`, with
          one line end at most. It is read by systemd, so it can be anywhere and readable by root only.
        '';
      };
      extraTokenFiles = mkOption {
        type = types.listOf unitPath;
        default = [ ];
        description = "Files with more tokens of this project, to change its token without a gap.";
      };
      instance = mkOption {
        type = types.str;
        example = "my-project";
        description = "The instance that this project's token asks to run.";
      };
    };
  };

  address =
    if webhook.socket != null then
      webhook.socket
    else if lib.hasInfix ":" webhook.host then
      "[${webhook.host}]:${toString webhook.port}"
    else
      "${webhook.host}:${toString webhook.port}";

  # NixOS leaves a socket that has changed as it is: this has it listen at its new address
  move = {
    description = "Address of Ekiben's webhook";
    wantedBy = [ "multi-user.target" ];
    reloadIfChanged = true;
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      # the argument is what changes: NixOS looks at no description
      ExecStart = "${lib.getExe' pkgs.coreutils "true"} ${address}";
      ExecReload = "${lib.getExe' config.systemd.package "systemctl"} restart ekiben-webhook.socket";
    };
  };

  socket = {
    description = "Socket of Ekiben's webhook";
    wantedBy = [ "sockets.target" ];
    listenStreams = [ address ];
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
  tokens = {
    description = "Tokens of Ekiben's webhook";
    wantedBy = [ "paths.target" ];
    unitConfig = insistent;
    pathConfig = {
      PathChanged = lib.unique (lib.concatMap tokenFiles (builtins.attrValues webhook.projects));
      Unit = "ekiben-restart@ekiben-webhook.service.service";
    };
  };
  tokenFiles = project: [ project.tokenFile ] ++ project.extraTokenFiles;

  # as in token.rs
  credentials = lib.concatMapAttrs (
    name: project:
    {
      "token-${name}" = project.tokenFile;
    }
    // lib.listToAttrs (
      lib.imap1 (number: nameValuePair "token-${name}.${toString number}") project.extraTokenFiles
    )
  ) webhook.projects;

  withTokens = {
    LoadCredential = mapAttrsToList (name: file: "${name}:${file}") credentials;
    # one that is missing is one project's trouble, not all others'
    SetCredential = map (name: "${name}:\\n") (builtins.attrNames credentials);
  };

  # has failed where one is not fit for use; with each start of the webhook, which goes on for the others
  check = {
    description = "Check of the tokens of Ekiben's webhook";
    restartIfChanged = false;
    startLimitIntervalSec = 0;
    serviceConfig =
      offlineSandbox
      // withTokens
      // {
        ExecStart = "${ekiben} tokens";
        DynamicUser = true;
        LimitCORE = 0;
      };
  };

  service = {
    description = "Ekiben's webhook";
    # not only when somebody knocks, so that a token that is missing is seen at once
    wantedBy = [ "multi-user.target" ];
    wants = [ "ekiben-webhook-tokens.service" ];
    requires = [ "ekiben-webhook.socket" ];
    after = [ "ekiben-webhook.socket" ];
    # or the switch would stop the socket, too, and refuse connections
    stopIfChanged = false;
    restartTriggers = [ config.environment.etc."ekiben/config.json".source ];
    startLimitIntervalSec = 0;
    serviceConfig =
      sandbox
      // growingPauses "200ms" "1s"
      // withTokens
      // {
        Type = "notify";
        ExecStart = "${ekiben} webhook";
        Restart = "always";
        WatchdogSec = "30s";
        DynamicUser = true;
        # may write the queue, and nothing else
        SupplementaryGroups = [ "ekiben" ];
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
          "/var/lib/ekiben/holds"
          "/var/lib/ekiben/status"
        ]
        ++ lib.optional (
          cfg.hub.enable && cfg.hub.publish.enable
        ) "-${cfg.hub.directory}/heard:/var/lib/ekiben/heard";
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
        SystemCallFilter = sandbox.SystemCallFilter ++ [ "~@resources" ];
        LimitCORE = 0;
        # of the queue's disk, a file of its own must take no more
        LimitFSIZE = "4K";
        LimitNOFILE = 256;
        MemoryMax = "32M";
        TasksMax = 4;
      };
  };

  assertionsOf = name: project: [
    {
      assertion = isName name;
      message = "`services.ekiben.webhook.projects.${name}` must be named by letters, digits, `_` and `-`.";
    }
    {
      assertion = instances ? ${project.instance};
      message = "`services.ekiben.webhook.projects.${name}.instance` must be one of `services.ekiben.instances`, not `${project.instance}`.";
    }
    (
      let
        others = filterAttrs (_: other: lib.elem project.tokenFile (tokenFiles other)) projects;
      in
      {
        assertion = builtins.attrNames others == [ name ];
        message = "`services.ekiben.webhook.projects.${name}.tokenFile`: ${concatStringsSep " and " (builtins.attrNames others)} have the same token file `${project.tokenFile}`.";
      }
    )
  ];

  # what works, but hardly as it is meant
  warnings =
    let
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
      # such as a VPN, whose addresses are not known here
      isTrusted = lib.remove "lo" firewall.trustedInterfaces != [ ];
      listens = "`services.ekiben.webhook.host` is `${webhook.host}`";
      port = "`networking.firewall.allowedTCPPorts`";
      inherit (config.services) nginx;
      virtualHost = nginx.virtualHosts.${webhook.nginx};
    in
    lib.optional (
      projects == { }
    ) "`services.ekiben.webhook.projects` is empty: the webhook refuses everybody."
    ++ lib.optional (
      webhook.socket == null && !isLocal && !isOpen && !isTrusted
    ) "${listens}, but the port ${toString webhook.port} is not in ${port}: nobody else can reach it."
    ++ lib.optional (
      webhook.socket == null && isLocal && firewall.enable && isOpen
    ) "${listens}, but the port ${toString webhook.port} is in ${port}: nobody else can reach it."
    ++
      lib.optional
        (
          webhook.nginx != null
          && !(
            virtualHost.addSSL || virtualHost.enableSSL or false || virtualHost.forceSSL || virtualHost.onlySSL
          )
        )
        "`services.nginx.virtualHosts.\"${webhook.nginx}\"` has no TLS, so tokens are sent in the clear: set `forceSSL` and `enableACME`."
    ++ lib.optional (
      webhook.caddy != null && hasPrefix "http://" webhook.caddy
    ) "`services.ekiben.webhook.caddy` has no TLS, so tokens are sent in the clear: remove `http://`.";
in
{
  options.services.ekiben.webhook = {
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
    socket =
      orNull unitPath "/run/ekiben.sock"
        "A Unix socket to listen on, for a proxy, instead of {option}`host` and {option}`port`.";
    nginx = orNull types.str "deploy.example.org" ''
      A virtual host of {option}`services.nginx` that passes requests on to the webhook, over a Unix
      socket. TLS is that virtual host's business.
    '';
    caddy =
      orNull types.str "deploy.example.org"
        "As {option}`nginx`, for a virtual host of {option}`services.caddy`.";
    path = mkOption {
      type = types.strMatching "/[^?#%\" \\]*";
      default = "/ekiben";
      description = "The path of the URL.";
    };
    projects = mkOption {
      type = types.attrsOf project;
      default = { };
      description = "The projects that may ask for runs, each with a token of its own.";
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

  config = mkIf (cfg.enable && webhook.enable) {
    assertions = lib.concatLists (mapAttrsToList assertionsOf projects) ++ [
      {
        assertion = builtins.match "[0-9.]+|[0-9a-fA-F:]+:[0-9a-fA-F:.]*" webhook.host != null;
        message = "`services.ekiben.webhook.host` must be an address such as `127.0.0.1`, not `${webhook.host}`.";
      }
      {
        assertion = webhook.nginx == null || config.services.nginx.enable;
        message = "`services.nginx.enable` must be `true` where `services.ekiben.webhook.nginx` is set.";
      }
      {
        assertion = webhook.caddy == null || config.services.caddy.enable;
        message = "`services.caddy.enable` must be `true` where `services.ekiben.webhook.caddy` is set.";
      }
    ];
    inherit warnings;
    services = {
      ekiben.settings.webhook = asDefaults { inherit (webhook) path projects; };
      ekiben.webhook.socket = mkIf (webhook.nginx != null || webhook.caddy != null) (
        lib.mkDefault "/run/ekiben.sock"
      );
      nginx.virtualHosts = mkIf (webhook.nginx != null) {
        ${webhook.nginx}.locations."= ${webhook.path}" = {
          proxyPass = "http://unix:${webhook.socket}";
          # as in gate.rs
          extraConfig = "client_max_body_size 32m;";
        };
      };
      caddy.virtualHosts = mkIf (webhook.caddy != null) {
        ${webhook.caddy}.extraConfig = "reverse_proxy ${webhook.path} unix/${webhook.socket}";
      };
    };
    systemd = {
      paths.ekiben-webhook = tokens;
      services = {
        ekiben-webhook = service;
        ekiben-webhook-address = move;
        ekiben-webhook-tokens = check;
      };
      sockets.ekiben-webhook = socket;
    };
  };
}
