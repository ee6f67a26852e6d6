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
          fileSystems."/".device = "none";
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
  # a working configuration with these changes
  variant =
    change:
    evaluate {
      services.ekiben = lib.recursiveUpdate {
        enable = true;
        instances.app = instance;
        webhook = {
          enable = true;
          projects.web = project;
        };
      } change;
    };

  key = letter: "ssh-ed25519 AAAA${letter}";
  hubOf = hosts: {
    hub = {
      enable = true;
      inherit hosts;
    };
  };

  mistakes = {
    "`services.ekiben.webhook.projects.web.instance`: there is no instance `nix`. Write one of `services.ekiben.instances`: app." =
      {
        webhook.projects.web.instance = "nix";
      };
    "`services.ekiben.webhook.projects.web.tokenFile`: other and web have the same token file `/run/token`. Write one of its own for each." =
      {
        webhook.projects.other = project;
      };
    "`services.ekiben.instances.app.flakeRef`: `/etc/nixos#host` is not in the repository. Write a flake in `flakePath`, as in `/var/nixos-config#host`." =
      {
        instances.app.flakeRef = "/etc/nixos#host";
      };
    "`services.ekiben.instances.app.flakeRef`: `/var/nixos-config-2#host` is not in the repository." = {
      instances.app.flakeRef = "/var/nixos-config-2#host";
    };
    "`services.ekiben.instances.app.user`: there is no user `nobody-here`. Write `users.users.nobody-here.isNormalUser = true;`" =
      {
        instances.app.user = "nobody-here";
      };
    "`services.ekiben.instances.app.user`: root must not evaluate a repository. Write the name of an unprivileged user" =
      {
        instances.app.user = "root";
      };
    "`services.ekiben.instances.web/2`: this name cannot be part of a unit's name. Write one of letters, digits" =
      {
        instances."web/2" = instance;
      };
    "`services.ekiben.instances.webhook`: this name cannot be part of a unit's name." = {
      instances.webhook = instance;
    };
    "`services.ekiben.instances.hub-files`: this name cannot be part of a unit's name." = {
      instances.hub-files = instance;
    };
    "`services.ekiben.hub.hosts.Web`: this name cannot be part of a user's name. Write one of at most 25 small letters" =
      hubOf { Web.publicKey = key "a"; };
    "`services.ekiben.hub.hosts.a-name-of-twenty-six-chars`: this name cannot be part of a user's name." =
      hubOf { a-name-of-twenty-six-chars.publicKey = key "a"; };
    "`services.ekiben.hub.hosts.-web`: this name cannot be part of a user's name." = hubOf {
      "-web".publicKey = key "a";
    };
    "`services.ekiben.hub.hosts.web.publicKey`: without a key, the host cannot log in. Write the line" =
      hubOf
        { web = { }; };
    "`services.ekiben.hub.hosts.web.publicKeys`: `no-pty ${key "a"}` is not a public key and nothing but a public key. Write the line" =
      hubOf { web.publicKey = "no-pty ${key "a"}"; };
    "`services.ekiben.hub.hosts.web.publicKeys`: `/etc/key.pub` is not a public key and nothing but a public key." =
      hubOf { web.publicKeys = [ "/etc/key.pub" ]; };
    "`services.ekiben.hub.hosts.web.publicKeys`: db and web have the same key. Make one of its own for each." =
      hubOf {
        web.publicKey = "${key "a"} root@web";
        db.publicKeys = [
          (key "b")
          "${key "a"} root@db"
        ];
      };
    "`services.ekiben.hub.hosts`: NixOS has 600 numbers for the users of all services, too few for 501 hosts. Write a `uid`" =
      hubOf (
        lib.genAttrs (map (number: "h${toString number}") (lib.range 1 501)) (name: {
          publicKey = key name;
        })
      );
    "`services.ekiben.hub.hosts.web.files.\"/etc/../secret\"`: a file cannot be there. Write an absolute path outside" =
      hubOf {
        web = {
          publicKey = key "a";
          files."/etc/../secret".source = "/run/secret";
        };
      };
    "`services.ekiben.hub.hosts.web.files.\"secret\"`: a file cannot be there." = hubOf {
      web = {
        publicKey = key "a";
        files.secret.source = "/run/secret";
      };
    };
    "`services.ekiben.hub.publishers`: `no-pty ${key "b"}` is not a public key and nothing but a public key." =
      lib.recursiveUpdate (hubOf { }) { hub.publishers = [ "no-pty ${key "b"}" ]; };
    "`services.ekiben.hub.user`: there is no user `nobody-here`. Write `users.users.nobody-here.isNormalUser = true;`" =
      {
        hub = {
          enable = true;
          user = "nobody-here";
        };
      };
    "`services.ekiben.hub.user`: `root` must not publish" = {
      hub = {
        enable = true;
        user = "root";
      };
    };
    "`services.ekiben.hub.user`: `fleet-web` must not publish" = lib.recursiveUpdate (hubOf {
      web.publicKey = key "a";
    }) { hub.user = "fleet-web"; };
    "`services.ekiben.webhook.projects.a b`: this name cannot be a credential's. Write one of letters, digits" =
      {
        webhook.projects."a b" = project // {
          tokenFile = "/run/other";
        };
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
    unknown = {
      instances.app.input = [ "app" ];
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
    size = {
      hub.reports.size = "50%";
    };
  };

  values = config: [
    config.services.ekiben.settings
    config.services.ekiben.webhook.projects
    config.services.ekiben.hub
  ];
  expect = what: condition: lib.optional (!condition) what;
  nothing = evaluate { };
  plain = variant { };
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
  wrong = lib.concatLists [
    (expect "nothing is enabled, nothing is there" (
      failures nothing == [ ]
      && ours nothing.systemd.units == { }
      && !(nothing.users.groups ? ekiben)
      && !(nothing.environment.etc ? "ekiben/config.json")
      && !(nothing.environment.etc ? "ekiben/hub.json")
      && !nothing.services.openssh.enable
    ))
    (expect "the published example works under its old name" (failures predecessor == [ ]))
    (expect "the published example is the same under both names" (
      lib.mapAttrs (_: unit: unit.text) (ours predecessor.systemd.units)
      == lib.mapAttrs (_: unit: unit.text) (ours (publishedUnder "ekiben").systemd.units)
    ))
    (expect "the published example makes these units" (
      builtins.attrNames (ours predecessor.systemd.units) == [
        "ekiben-tgautobot.path"
        "ekiben-tgautobot.service"
        "ekiben-tgautobot.timer"
        "ekiben-webhook-address.service"
        "ekiben-webhook.service"
        "ekiben-webhook.socket"
        "ekiben.service"
      ]
    ))
    (expect "the published example's flake is deployed" (
      predecessor.services.ekiben.settings.instances.tgautobot.flakeRef == "/var/nixos-config#pussy"
    ))
    (expect "a working configuration has no failed assertion" (failures plain == [ ]))
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
      && hub.environment.variables.EKIBEN_FLEET == "/var/fleet"
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
    (expect "no dates, no timer" (!(elsewhere.systemd.timers ? ekiben-app)))
    (lib.concatLists (
      lib.mapAttrsToList (
        message: change:
        let
          said = failures (variant change);
        in
        expect "expected: ${message}\nfound: ${lib.concatStringsSep "\n" said}" (
          lib.any (lib.hasPrefix message) said
        )
      ) mistakes
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
    configurations = map (config: config.environment.etc."ekiben/config.json".source) [
      predecessor
      plain
      elsewhere
    ];
    wrong = lib.concatStringsSep "\n" wrong;
  }
  ''
    [ -z "$wrong" ] || { echo "$wrong"; exit 1; }
    echo $configurations > $out
  ''
