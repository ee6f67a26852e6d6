# The module by itself: configurations that have to work, mistakes that have to be named.
{
  self,
  nixpkgs,
  pkgs,
}:
let
  inherit (nixpkgs) lib;

  evaluate =
    module:
    (import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = null;
      modules = [
        self.nixosModules.default
        {
          nixpkgs = { inherit pkgs; };
          networking.hostName = "host";
          users.users.deploy.isNormalUser = true;
          # as far as the assertions of others are concerned
          boot.loader.grub.enable = false;
          fileSystems."/" = {
            device = "none";
            fsType = "tmpfs";
          };
          system.stateVersion = lib.trivial.release;
        }
        module
      ];
    }).config;

  failures =
    config:
    map (assertion: assertion.message) (lib.filter (assertion: !assertion.assertion) config.assertions);
  ours = lib.filterAttrs (name: _: lib.hasPrefix "ekiben" name);

  # the published example of the program that this one replaces, to the letter
  published =
    { config, ... }:
    {
      enable = true;

      # Global Webhook Daemon Configuration
      webhook = {
        enable = true;
        host = "127.0.0.1"; # Kept local; expose via Nginx/Caddy proxy
        port = 8787;
        path = "/patchouli-deployment";
      };

      # Independent deployment targets
      instances.tgautobot = {
        flakePath = "/var/nixos-config";
        flakeRef = "/var/nixos-config#pussy";
        user = "licking";
        inputs = [ "telegram-automation-bot" ];
        dates = "daily"; # Fallback polling timer expression
      };

      # Webhook to Instance mapping
      webhook.projects.tgautobot = {
        tokenFile = config.age.secrets."tgautobot-cd-token".path;
        instance = "tgautobot";
      };
    };
  publishedUnder =
    name:
    evaluate (
      { config, ... }:
      {
        options.age = lib.mkOption { };
        config = {
          age.secrets."tgautobot-cd-token".path = "/run/agenix/tgautobot-cd-token";
          users.users.licking.isNormalUser = true;
          services.${name} = published { inherit config; };
        };
      }
    );
  predecessor = publishedUnder "patchouli-deployment";

  instance = {
    flakePath = "/var/nixos-config";
    user = "deploy";
  };
  project = {
    tokenFile = "/run/token";
    instance = "app";
  };
  working = {
    enable = true;
    instances.app = instance;
    webhook = {
      enable = true;
      projects.web = project;
    };
  };
  # a working configuration with these changes
  variant = change: evaluate { services.ekiben = lib.recursiveUpdate working change; };
  # with a module more
  beside =
    module:
    evaluate {
      imports = [
        { services.ekiben = working; }
        module
      ];
    };

  key = letter: "ssh-ed25519 AAAA${letter}";
  hubOf = hosts: {
    hub = {
      enable = true;
      inherit hosts;
    };
  };

  mistakes = {
    "`services.ekiben.webhook.projects.web.instance` must be one of `services.ekiben.instances`, not `nix`." =
      {
        webhook.projects.web.instance = "nix";
      };
    "`services.ekiben.webhook.projects.web.tokenFile`: other and web have the same token file `/run/token`." =
      {
        webhook.projects.other = project;
      };
    "`services.ekiben.instances.app.flakeRef` must be below `/var/nixos-config`, not `/etc/nixos#host`." =
      {
        instances.app.flakeRef = "/etc/nixos#host";
      };
    "`services.ekiben.instances.app.flakeRef` must be below `/var/nixos-config`, not `/var/nixos-config-2#host`." =
      {
        instances.app.flakeRef = "/var/nixos-config-2#host";
      };
    "`services.ekiben.instances.app.user`: user `nobody-here` does not exist; set `users.users.nobody-here.isNormalUser = true;`" =
      {
        instances.app.user = "nobody-here";
      };
    "`services.ekiben.instances.app.user` must not be `root`." = {
      instances.app.user = "root";
    };
    "`services.ekiben.instances.app.flakePath` must not contain `..`." = {
      instances.app.flakePath = "/var/../etc/nixos";
    };
    "`services.ekiben.instances.app.flakePath` must not be `/tmp/config`: use a directory" = {
      instances.app.flakePath = "/tmp/config";
    };
    "`services.ekiben.instances.app.flakePath` must not be `/run/config`:" = {
      instances.app.flakePath = "/run/config";
    };
    "`services.ekiben.instances.app.flakePath` must not be `/`:" = {
      instances.app.flakePath = "//";
    };
    "`services.ekiben.instances.app.flakePath` must not be the home of `deploy`: use a directory in it." =
      {
        instances.app.flakePath = "/home/deploy/";
      };
    "`services.ekiben.instances.app.healthChecks` must name units in full, such as `postgresql.service`." =
      {
        instances.app.healthChecks.database.units = [ "postgresql" ];
      };
    "`services.ekiben.webhook.host` must be an address such as `127.0.0.1`, not `localhost`." = {
      webhook.host = "localhost";
    };
    "`services.ekiben.webhook.host` must be an address such as `127.0.0.1`, not `0.0.0.0:8787`." = {
      webhook.host = "0.0.0.0:8787";
    };
    "`services.nginx.enable` must be `true` where `services.ekiben.webhook.nginx` is set." = {
      webhook.nginx = "deploy.example.org";
    };
    "`services.caddy.enable` must be `true` where `services.ekiben.webhook.caddy` is set." = {
      webhook.caddy = "deploy.example.org";
    };
    "`services.ekiben.instances.web/2` must be named by letters, digits" = {
      instances."web/2" = instance;
    };
    "`services.ekiben.hub.publish.repository` must be set: it is what is published." =
      lib.recursiveUpdate (hubOf { })
        { hub.publish.enable = true; };
    "`services.ekiben.hub.hosts.Web` must be named by at most 25 lowercase letters" = hubOf {
      Web.publicKey = key "a";
    };
    "`services.ekiben.hub.hosts.a-name-of-twenty-six-chars` must be named by at most 25" = hubOf {
      a-name-of-twenty-six-chars.publicKey = key "a";
    };
    "`services.ekiben.hub.hosts.-web` must be named by at most 25" = hubOf {
      "-web".publicKey = key "a";
    };
    "`services.ekiben.hub.hosts.web.publicKey` must be set: without a key, the host cannot log in." =
      hubOf
        { web = { }; };
    "`services.ekiben.hub.hosts.web.publicKeys` must be lines of `.pub` files, not `no-pty ${key "a"}`." =
      hubOf { web.publicKey = "no-pty ${key "a"}"; };
    "`services.ekiben.hub.hosts.web.publicKeys` must be lines of `.pub` files, not `/etc/key.pub`." =
      hubOf
        { web.publicKeys = [ "/etc/key.pub" ]; };
    "`services.ekiben.hub.hosts.web.publicKeys`: db and web have the same key." = hubOf {
      web.publicKey = "${key "a"} root@web";
      db.publicKeys = [
        (key "b")
        "${key "a"} root@db"
      ];
    };
    "`services.ekiben.hub.hosts`: 501 hosts are more than NixOS has uids for; set `uid`" = hubOf (
      lib.genAttrs (map (number: "h${toString number}") (lib.range 1 501)) (name: {
        publicKey = key name;
      })
    );
    "`services.ekiben.hub.hosts.web.files.\"/etc/../secret\"` must be an absolute path outside" =
      hubOf
        {
          web = {
            publicKey = key "a";
            files."/etc/../secret".source = "/run/secret";
          };
        };
    "`services.ekiben.hub.hosts.web.files.\"secret\"` must be an absolute path outside" = hubOf {
      web = {
        publicKey = key "a";
        files.secret.source = "/run/secret";
      };
    };
    "`services.ekiben.hub.publishers` must be lines of `.pub` files, not `no-pty ${key "b"}`." =
      lib.recursiveUpdate (hubOf { })
        { hub.publishers = [ "no-pty ${key "b"}" ]; };
    "`services.ekiben.hub.user`: user `nobody-here` does not exist; set `users.users.nobody-here.isNormalUser = true;`" =
      {
        hub = {
          enable = true;
          user = "nobody-here";
        };
      };
    "`services.ekiben.hub.metrics` and `statusPage` must be in other directories than `services.ekiben.metrics`" =
      {
        metrics = "/var/lib/node-exporter/ekiben.prom";
        hub = {
          enable = true;
          metrics = "/var/lib/node-exporter/fleet.prom";
        };
      };
    "`services.ekiben.hub.user` must not be `root`" = {
      hub = {
        enable = true;
        user = "root";
      };
    };
    "`services.ekiben.fleet.hub` must have `host` and `hostKey`, or `url`." = {
      fleet = {
        enable = true;
        hub = { };
      };
    };
    "`services.ekiben.fleet.hub` must have both `host` and `hostKey`" = {
      fleet = {
        enable = true;
        hub = [
          {
            host = "hub";
            url = "https://hub";
          }
        ];
        signers = [ (key "a") ];
      };
    };
    "`services.ekiben.fleet.hub` must not have `url` more than once" = {
      fleet = {
        enable = true;
        hub = [
          { url = "https://a"; }
          { url = "https://b"; }
        ];
        signers = [ (key "a") ];
      };
    };
    "`services.ekiben.fleet.signers` must not be empty with `hub.url`" = {
      fleet = {
        enable = true;
        hub.url = "https://hub/path";
      };
    };
    "`services.ekiben.fleet.hub.reportsUrl` must be beside `url`" = {
      fleet = {
        enable = true;
        hub = {
          url = "https://a";
          reportsUrl = "https://b";
          host = "hub";
          hostKey = key "b";
        };
        signers = [ (key "a") ];
      };
    };
    "`services.ekiben.hub.user` must not be `fleet-web`" = lib.recursiveUpdate (hubOf {
      web.publicKey = key "a";
    }) { hub.user = "fleet-web"; };
    "`services.ekiben.webhook.projects.a b` must be named by letters, digits" = {
      webhook.projects."a b" = project // {
        tokenFile = "/run/other";
      };
    };
  };

  # mistakes that other options make
  mistakesElsewhere = {
    "`system.switch.enable` must be `true`: Ekiben switches this system." = {
      system.switch.enable = false;
    };
    "`nix.settings.allowed-users` must contain `deploy`, the user of `services.ekiben.instances.app`." =
      {
        nix.settings.allowed-users = [ "@wheel" ];
      };
    "`nix.enable` must be `true`: Ekiben builds this system." = {
      nix.enable = false;
    };
    "`security.allowUserNamespaces` must be `true`: Ekiben's sandbox is made of them." = {
      security.allowUserNamespaces = false;
      nix.settings.sandbox = false;
    };
  };

  # what works, but hardly as it is meant
  doubts = {
    "`services.ekiben.instances` is empty: nothing is ever deployed." = {
      services.ekiben.instances = lib.mkForce { };
    };
    "`services.ekiben.instances.second` has no trigger but `ekiben trigger second`: set `dates`" = {
      services.ekiben.instances.second = instance // {
        dates = null;
      };
    };
    "`services.ekiben.instances.second.user` should be that of all instances with the flakePath `/var/nixos-config`" =
      {
        users.users.other.isNormalUser = true;
        services.ekiben.instances.second = instance // {
          user = "other";
        };
      };
    "`services.ekiben.webhook.projects` is empty: the webhook refuses everybody." = {
      services.ekiben.webhook.projects = lib.mkForce { };
    };
    "`services.ekiben.webhook.host` is `0.0.0.0`, but the port 8787 is not in `networking.firewall.allowedTCPPorts`" =
      {
        services.ekiben.webhook.host = "0.0.0.0";
      };
    "`services.ekiben.webhook.host` is `127.0.0.1`, but the port 8787 is in `networking.firewall.allowedTCPPorts`" =
      {
        networking.firewall.allowedTCPPorts = [ 8787 ];
      };
    "`services.nginx.virtualHosts.\"deploy.example.org\"` has no TLS, so tokens are sent in the clear:" =
      {
        services.ekiben.webhook.nginx = "deploy.example.org";
        services.nginx.enable = true;
      };
    "`services.ekiben.webhook.caddy` has no TLS, so tokens are sent in the clear:" = {
      services.ekiben.webhook.caddy = "http://deploy.example.org";
      services.caddy.enable = true;
    };
    "`system.autoUpgrade.enable` should be `false` beside `services.ekiben`" = {
      system.autoUpgrade.enable = true;
    };
    "`users.users.deploy` should not be in group `wheel`, whose members can become root" = {
      users.users.deploy.extraGroups = [ "wheel" ];
    };
    "`users.users.deploy` should not be in group `docker`, whose members can become root" = {
      users.groups.docker.members = [ "deploy" ];
    };
    "`nix.settings.trusted-users` should not contain `deploy`: trusted users can become root." = {
      nix.settings.trusted-users = [ "@users" ];
    };
  };
  # and what is as it is meant, though it looks like that
  noDoubts = {
    "a firewall that lets the webhook's port through" = {
      services.ekiben.webhook.host = "::";
      networking.firewall.interfaces.eth0.allowedTCPPortRanges = [
        {
          from = 8000;
          to = 9000;
        }
      ];
    };
    "a firewall that lets all through where the webhook listens" = {
      services.ekiben.webhook.host = "100.64.0.1";
      networking.firewall.trustedInterfaces = [ "tailscale0" ];
    };
    "a proxy with TLS" = {
      services.ekiben.webhook.nginx = "deploy.example.org";
      services.nginx.enable = true;
      services.nginx.virtualHosts."deploy.example.org" = {
        onlySSL = true;
        sslCertificate = "/var/certificate";
        sslCertificateKey = "/var/key";
      };
    };
    "a user that Nix allows by its group" = {
      nix.settings.allowed-users = [ "@users" ];
    };
  };

  # what is wrong by type has Nix' own message
  wrongTypes = {
    tokenFile = {
      webhook.projects.web.tokenFile = "relative";
    };
    tokenInStore = {
      webhook.projects.web.tokenFile = "${builtins.storeDir}/token";
    };
    flakePath = {
      instances.app.flakePath = "nixos-config";
    };
    path = {
      webhook.path = "ekiben?x";
    };
    author = {
      instances.app.author = "me";
    };
    metrics = {
      metrics = "/var/lib/my metrics/ekiben.prom";
    };
    metricsAmongOthers = {
      metrics = "/tmp/ekiben.prom";
    };
    pageAmongOthers = {
      hub.statusPage = "/var/lib/index.html";
    };
    pageAtHome = {
      hub.statusPage = "/home/alice/index.html";
    };
    directoryOfOthers = {
      hub.directory = "/srv";
    };
    rebootWindow = {
      instances.app.rebootWindow.lower = "1 am";
    };
    unknown = {
      instances.app.input = [ "app" ];
    };
    signers = {
      instances.app.signers = [ "/etc/key.pub" ];
    };
    fleetSigners = {
      fleet.signers = [ "alice ${key "a"}" ];
    };
    publishSigners = {
      hub.publish.signers = [ "AAAAa" ];
    };
    hostKey = {
      fleet = {
        enable = true;
        hub = {
          host = "hub";
          hostKey = "hub ${key "a"}";
        };
      };
    };
    sourceInStore = hubOf {
      web.files."/secret".source = "${builtins.storeDir}/secret";
    };
    mode = hubOf {
      web.files."/secret" = {
        source = "/secret";
        mode = "u=r";
      };
    };
    directory = {
      hub.directory = "/srv/my fleet";
    };
    tokenWithSpace = {
      webhook.projects.web.tokenFile = "/root/my token";
    };
    tokenThatSystemdExpands = {
      webhook.projects.web.tokenFile = "/root/%i";
    };
    interval = {
      hub.reports.interval = "every minute";
    };
    longInterval = {
      hub.reports.interval = "6min";
    };
    size = {
      hub.reports.size = "50%";
    };
  };

  values = config: [
    config.services.ekiben.settings
    config.services.ekiben.fleet.signers
    config.services.ekiben.metrics
    config.services.ekiben.webhook.projects
    config.services.ekiben.hub
  ];
  expect = what: condition: lib.optional (!condition) what;
  # the messages that changes have to lead to
  saying =
    found: configuration: changes:
    lib.concatLists (
      lib.mapAttrsToList (
        message: change:
        let
          said = found (configuration change);
        in
        expect "expected: ${message}\nfound: ${lib.concatStringsSep "\n" said}" (
          lib.any (lib.hasPrefix message) said
        )
      ) changes
    );
  file = config: config.environment.etc."ekiben/config.json".source;
  times = config: lib.findFirst (check: check.name == "ekiben-times") null config.system.checks;
  nothing = evaluate { };
  plain = variant { };
  # of a time zone, where there are none
  zoned = variant { instances.app.dates = "Mon *-*-* 04:40 Europe/Berlin"; };
  elsewhere = variant {
    webhook = {
      socket = "/run/ekiben.sock";
    };
    instances.app = {
      flakeRef = "git+file:///var/nixos-config?dir=hosts";
      dates = null;
    };
  };
  proxied = evaluate {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        nginx = "n.example.org";
        caddy = "c.example.org";
      };
    };
  };
  publishers = evaluate {
    services.ekiben = lib.recursiveUpdate (hubOf { web.publicKey = key "a"; }) {
      hub.publishers = [ (key "b") ];
    };
  };
  sysusers = evaluate {
    systemd.sysusers.enable = true;
    services.ekiben = hubOf { web.publicKey = key "a"; };
  };
  # a hub that deploys nothing itself, and whose administrator publishes
  hub = evaluate {
    services.ekiben.hub = {
      enable = true;
      user = "deploy";
      repository = "/var/fleet";
      directory = "/srv/hub";
      hosts.web.publicKey = key "a";
      hosts.db = {
        publicKey = key "b";
        uid = 31000;
      };
    };
    services.openssh.extraConfig = lib.mkAfter ''
      Match User deploy
        X11Forwarding yes
    '';
  };
  reserved = lib.splitString "\n" (lib.fileContents ../src/reserved-names);
  # with all that there is, the units but those of the instance `fleet`
  ownUnits =
    let
      all = evaluate {
        services.ekiben = lib.recursiveUpdate (hubOf { web.publicKey = key "a"; }) {
          webhook.enable = true;
          fleet = {
            enable = true;
            hub = {
              host = "hub";
              hostKey = key "b";
            };
            reboot.when = "needed";
          };
        };
      };
      stem = unit: builtins.head (builtins.match "ekiben-(.*)[.][a-z]+" unit);
      names = lib.filter (lib.hasPrefix "ekiben-") (builtins.attrNames all.systemd.units);
    in
    lib.remove "fleet" (lib.unique (map stem names));
  wrong = lib.concatLists [
    (expect "nothing is enabled, nothing is there" (
      failures nothing == [ ]
      && ours nothing.systemd.units == { }
      && !(nothing.users.groups ? ekiben)
      && !(nothing.environment.etc ? "ekiben/config.json")
      && !nothing.services.openssh.enable
    ))
    (expect "the published example works under its old name" (failures predecessor == [ ]))
    (expect "the published example is the same under both names" (
      lib.mapAttrs (_: unit: unit.text) (ours predecessor.systemd.units)
      == lib.mapAttrs (_: unit: unit.text) (ours (publishedUnder "ekiben").systemd.units)
    ))
    (expect "the published example makes these units" (
      builtins.attrNames (ours predecessor.systemd.units) == [
        "ekiben-boot.service"
        "ekiben-due@.service"
        "ekiben-found@.service"
        "ekiben-holds.path"
        "ekiben-holds.service"
        "ekiben-look@tgautobot.service"
        "ekiben-restart@.service"
        "ekiben-retry@.service"
        "ekiben-tgautobot.path"
        "ekiben-tgautobot.service"
        "ekiben-tgautobot.timer"
        "ekiben-webhook-address.service"
        "ekiben-webhook-tokens.service"
        "ekiben-webhook.path"
        "ekiben-webhook.service"
        "ekiben-webhook.socket"
        "ekiben.service"
      ]
    ))
    (expect "the published example's flake is deployed" (
      predecessor.services.ekiben.settings.instances.tgautobot.flakeRef == "/var/nixos-config#pussy"
    ))
    (expect "a working configuration has no failed assertion" (failures plain == [ ]))
    (expect "a new system is observed before it is what is booted" (
      plain.services.ekiben.settings.instances.app.observe == 30
    ))
    (expect "the flake and its configuration go without saying" (
      plain.services.ekiben.settings.instances.app.flakeRef == "/var/nixos-config#host"
      && plain.services.ekiben.settings.instances.app.inputs == [ ]
    ))
    (expect "the host name is the configuration's name where none is given" (
      elsewhere.services.ekiben.settings.instances.app.flakeRef
      == "git+file:///var/nixos-config?dir=hosts#host"
      && failures elsewhere == [ ]
    ))
    (expect "a Unix socket takes the place of host and port" (
      elsewhere.systemd.sockets.ekiben-webhook.listenStreams == [ "/run/ekiben.sock" ]
    ))
    (expect "a line makes the virtual host of a proxy" (
      proxied.systemd.sockets.ekiben-webhook.listenStreams == [ "/run/ekiben.sock" ]
      &&
        proxied.services.nginx.virtualHosts."n.example.org".locations."= /ekiben".proxyPass
        == "http://unix:/run/ekiben.sock"
      &&
        proxied.services.caddy.virtualHosts."c.example.org".extraConfig
        == "reverse_proxy /ekiben unix//run/ekiben.sock"
    ))
    (expect "a hub needs no instance" (
      failures hub == [ ]
      &&
        builtins.attrNames (ours hub.systemd.units) == [
          "ekiben-hub-collect.service"
          "ekiben-hub-collect.timer"
          "ekiben-hub-files.service"
          "ekiben-hub-files.timer"
        ]
      && hub.systemd.units ? "srv-hub-hosts-web-reports.mount"
      && lib.hasInfix "= 0 ] || export EKIBEN_FLEET=" hub.environment.extraInit
      && hub.services.openssh.enable
    ))
    (expect "who publishes is an administrator, and in no host's group" (
      hub.users.groups.ekiben-hub.members == [ "deploy" ]
      && !(hub.users.users ? ekiben-hub)
      &&
        hub.users.groups.ekiben-hosts.members == [
          "fleet-db"
          "fleet-web"
        ]
      && hub.users.users.fleet-web.group == "fleet-web"
    ))
    (expect "a host has the number that it is given, or one of NixOS'" (
      hub.users.users.fleet-db.uid == 31000
      && hub.users.groups.fleet-db.gid == 31000
      && hub.users.users.fleet-web.uid == null
    ))
    (expect "a host's user is not locked, and its key is restricted" (
      hub.users.users.fleet-web.hashedPassword == "*"
      && hub.users.users.fleet-web.openssh.authorizedKeys.keys == [ "restrict ${key "a"}" ]
    ))
    (expect "nor where systemd-sysusers makes it" (
      sysusers.users.users.fleet-web.initialHashedPassword == "*"
      && hub.users.users.fleet-web.initialHashedPassword == null
    ))
    (expect "who publishes from elsewhere is a user with restricted keys, if there is one" (
      !(hub.users.users ? ekiben-publisher)
      && hub.users.groups.ekiben-publisher.members == [ "deploy" ]
      && publishers.users.users.ekiben-publisher.openssh.authorizedKeys.keys == [ "restrict ${key "b"}" ]
      && publishers.users.groups.ekiben-hub.members == [ "ekiben-hub" ]
    ))
    (expect "what is said of hosts is the last word in sshd's configuration" (
      lib.hasSuffix "Match all\n" hub.services.openssh.extraConfig
      &&
        builtins.match ".*Match User deploy.*Match Group ekiben-hosts.*" hub.services.openssh.extraConfig
        != null
    ))
    (expect "reboots are allowed by the names of system.autoUpgrade, too" (
      let
        window = {
          lower = "02:00";
          upper = "04:00";
        };
        ours = {
          reboot = {
            when = "needed";
            inherit window;
          };
        };
        theirs = {
          allowReboot = true;
          rebootWindow = window;
        };
        of =
          names:
          evaluate {
            services.ekiben = lib.recursiveUpdate working {
              instances.app = names;
              fleet = names // {
                enable = true;
                hub = {
                  host = "hub";
                  hostKey = key "b";
                };
              };
            };
          };
        policies =
          config: lib.mapAttrs (_: instance: instance.reboot) config.services.ekiben.settings.instances;
        expected = {
          when = "needed";
          inherit window;
          kexec = false;
        };
      in
      lib.all
        (
          names:
          policies (of names) == {
            app = expected;
            fleet = expected;
          }
          && failures (of names) == [ ]
        )
        [
          ours
          theirs
        ]
      && !(plain.systemd.timers ? ekiben-reboot)
      && (variant { instances.app.allowReboot = true; }).systemd.timers ? ekiben-reboot
      && !(variant { instances.app.allowReboot = false; }).systemd.services ? ekiben-reboot
    ))
    (expect "the program knows the boot loader, where that may boot a system once" (
      let
        loader =
          loader: (beside { boot = { inherit loader; }; }).services.ekiben.settings.bootLoader or null;
        grub = grub: loader { grub = lib.mkForce ({ enable = true; } // grub); };
        esp =
          (beside {
            boot.loader = {
              systemd-boot.enable = true;
              systemd-boot.xbootldrMountPoint = "/boot";
              efi.efiSysMountPoint = "/efi";
            };
          }).systemd.services.ekiben-app.environment;
      in
      loader { } == null
      && loader { systemd-boot.enable = true; } == "systemd-boot"
      && grub { device = "/dev/sda"; } == "grub"
      && grub { mirroredBoots = [ ]; } == null
      && grub { device = "nodev"; } == null
      &&
        grub {
          device = "nodev";
          efiSupport = true;
        } == "grub"
      &&
        grub {
          mirroredBoots =
            map
              (path: {
                inherit path;
                devices = [ "nodev" ];
              })
              [
                "/boot"
                "/boot2"
              ];
        } == null
      && esp.SYSTEMD_ESP_PATH == "/efi"
      && esp.SYSTEMD_XBOOTLDR_PATH == "/boot"
    ))
    (expect "settings may say otherwise than options" (
      let
        inherit
          ((evaluate {
            services.ekiben = lib.recursiveUpdate working (
              lib.recursiveUpdate (hubOf { web.publicKey = key "a"; }) {
                hub.publish = {
                  enable = true;
                  repository = "/var/fleet";
                };
                fleet = {
                  enable = true;
                  hub = {
                    host = "hub";
                    hostKey = key "b";
                  };
                };
                settings = {
                  hub.directory = "/srv/hub";
                  instances = {
                    app.observe = 300;
                    fleet.hub.name = "other";
                    publish.publish.parallel = 8;
                  };
                  webhook.path = "/other";
                };
              }
            );
          }).services.ekiben
          )
          settings
          ;
      in
      settings.hub.directory == "/srv/hub"
      && settings.instances.app.observe == 300
      && settings.instances.app.user == "deploy"
      && settings.instances.fleet.hub.name == "other"
      && settings.instances.publish.publish.parallel == 8
      && settings.webhook.path == "/other"
    ))
    (expect "what has no mistake of type has none" (builtins.deepSeq (values plain) true))
    (expect "what reaches the network does so by the proxy" (
      let
        inherit
          ((evaluate {
            networking.proxy.default = "http://proxy:3128";
            services.ekiben = lib.recursiveUpdate working {
              fleet = {
                enable = true;
                hub = {
                  host = "hub";
                  hostKey = key "b";
                };
              };
            };
          }).systemd
          )
          services
          ;
      in
      lib.all (name: services.${name}.environment ? https_proxy) [
        "ekiben"
        "ekiben-app"
        "ekiben-boot"
        "ekiben-deliver"
        "ekiben-look@app"
        "ekiben-reach@"
      ]
    ))
    (expect "no dates, no timer" (!(elsewhere.systemd.timers ? ekiben-app)))
    (expect "a working configuration has no warning" (plain.warnings == [ ]))
    (expect "needless slashes are ignored" (
      (variant {
        instances.app = {
          flakePath = "/var//nixos-config/";
          flakeRef = "git+file:///var/nixos-config//hosts/./?submodules=1#host";
        };
      }).services.ekiben.settings.instances.app.flakeRef
      == "git+file:///var/nixos-config/hosts?submodules=1#host"
      &&
        (variant { instances.app.flakePath = "/var//nixos-config/"; })
        .services.ekiben.settings.instances.app.flakeRef == "/var/nixos-config#host"
    ))
    (expect "what builds nothing asks caches again at once" (
      let
        settings = build: (variant { instances.app.build = build; }).nix.settings;
      in
      (settings "substitute").narinfo-cache-negative-ttl == 0
      && (settings "substitute").always-allow-substitutes
      && !(settings "local") ? narinfo-cache-negative-ttl
    ))
    (saying failures variant mistakes)
    (saying failures variant (
      lib.listToAttrs (
        map (name: {
          name = "`services.ekiben.instances.${name}` must be named by letters";
          value.instances.${name} = instance;
        }) ownUnits
      )
    ))
    (expect "reserved are the names of all units but the instances': ${toString ownUnits}" (
      # no instance can have a template's name
      lib.subtractLists reserved (lib.filter (name: !lib.hasInfix "@" name) ownUnits) == [ ]
      && ownUnits != [ ]
    ))
    (saying failures beside mistakesElsewhere)
    (saying (config: config.warnings) beside doubts)
    (lib.concatLists (
      lib.mapAttrsToList (
        what: module:
        let
          config = beside module;
        in
        expect "${what}: ${lib.concatStringsSep "\n" (config.warnings ++ failures config)}" (
          config.warnings ++ failures config == [ ]
        )
      ) noDoubts
    ))
    (lib.concatLists (
      lib.mapAttrsToList (
        name: change:
        expect "a wrong ${name} is accepted" (
          !(builtins.tryEval (builtins.deepSeq (values (variant change)) true)).success
        )
      ) wrongTypes
    ))
  ];
in
pkgs.runCommand "ekiben-options"
  {
    # these are built with `ekiben check`
    configurations =
      map file [
        predecessor
        plain
        elsewhere
      ]
      ++ [ (times zoned) ];
    wrong = lib.concatStringsSep "\n" wrong;
    json = builtins.toJSON plain.services.ekiben.settings;
    passAsFile = [ "json" ];
    inherit reserved;
    # these cannot be built
    unfit = map (change: pkgs.testers.testBuildFailure (times (variant change))) [
      { instances.app.dates = "4 in the morning"; }
      { instances.app.randomizedDelaySec = "soon"; }
    ];
  }
  ''
    [ -z "$wrong" ] || { echo "$wrong"; exit 1; }
    for name in $reserved; do
        sed "s/\"app\"/\"$name\"/g" "$jsonPath" > config.json
        ! ${lib.getExe plain.services.ekiben.package} check config.json 2> said || { echo "The program accepts an instance $name."; exit 1; }
        grep -q "the name $name is taken" said
    done
    for log in $unfit; do
        grep -q 'services.ekiben.instances.app.* must be as in systemd.time(7), not' $log/testBuildFailure.log
    done
    echo $configurations > $out
  ''
