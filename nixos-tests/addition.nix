# What a virtual machine's flake adds to the machine from its inputs: the contents of `app` and
# `other` show in /etc, and a file `trouble` in `app` breaks the system in the way it names.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.scenario;
  read = input: lib.fileContents (input + "/content");
  trouble =
    if builtins.pathExists (cfg.app + "/trouble") then
      lib.fileContents (cfg.app + "/trouble")
    else
      "none";
in
{
  options.scenario = {
    revision = lib.mkOption { };
    app = lib.mkOption { };
    other = lib.mkOption { };
  };
  config = lib.mkMerge [
    {
      environment.etc = {
        app.text = read cfg.app;
        other.text = read cfg.other;
        revision.text = cfg.revision;
      };
    }
    (lib.mkIf (trouble == "evaluation") {
      environment.etc.trouble.text = throw "trouble in evaluation";
    })
    (lib.mkIf (trouble == "build") {
      environment.etc.trouble.source = pkgs.runCommand "trouble" { } "echo trouble in build >&2; exit 1";
    })
    (lib.mkIf (trouble == "build-hangs") {
      environment.etc.trouble.source = pkgs.runCommand "trouble" { } "sleep 3600";
    })
    (lib.mkIf (trouble == "no-nixos") {
      system.extraSystemBuilderCmds = "rm $out/init";
    })
    (lib.mkIf (trouble == "boot-loader") {
      system.build.installBootLoader = lib.mkForce "${pkgs.coreutils}/bin/false";
    })
    (lib.mkIf (trouble == "activation") { system.activationScripts.trouble = "false"; })
    (lib.mkIf (trouble == "activation-ends") { system.activationScripts.trouble = "exit 0"; })
    (lib.mkIf (trouble == "hang") { system.activationScripts.trouble = "sleep 3600"; })
    (lib.mkIf (trouble == "network") {
      system.activationScripts.trouble = "${pkgs.iproute2}/bin/ip link set eth1 down";
    })
    (lib.mkIf (trouble != "network") {
      system.activationScripts.network = "${pkgs.iproute2}/bin/ip link set eth1 up || true";
    })
    (lib.mkIf (trouble == "unit") {
      systemd.services.scenario-trouble = {
        wantedBy = [ "multi-user.target" ];
        serviceConfig = {
          Type = "oneshot";
          ExecStart = "${pkgs.coreutils}/bin/false";
        };
      };
    })
    # one that ran, and now never comes up, however often that is tried
    (lib.mkIf (trouble == "unit-again") {
      systemd.services.scenario-daemon.serviceConfig = {
        Restart = "always";
        ExecStartPre = "/bin/sh -c 'sleep 5; exit 1'";
      };
    })
    # units that ran, and now cannot be loaded, or miss what they require
    (lib.mkIf (trouble == "unit-broken") {
      systemd.services.scenario-daemon.serviceConfig.ExecStart = lib.mkForce "";
    })
    (lib.mkIf (trouble == "unit-requires") {
      systemd.services.scenario-daemon.requires = [ "scenario-missing.service" ];
    })
    # and one that goes on as it was
    (lib.mkIf (trouble == "restart") {
      systemd.services.scenario-daemon = {
        requires = [ "scenario-missing.service" ];
        stopIfChanged = false;
      };
    })
    (lib.mkIf (trouble == "reload") {
      systemd.services.scenario-daemon = {
        reloadIfChanged = true;
        serviceConfig.ExecReload = "${pkgs.coreutils}/bin/false";
      };
    })
    (lib.mkIf (trouble == "unit-late") {
      systemd.services.scenario-trouble = {
        wantedBy = [ "multi-user.target" ];
        requires = [ "scenario-missing.service" ];
        serviceConfig.ExecStart = "/bin/sh -c 'exec sleep infinity'";
      };
    })
    (lib.mkIf (trouble == "timer") {
      systemd.timers.scenario-clock.timerConfig.OnCalendar = lib.mkForce "on a Sunday";
    })
    (lib.mkIf (trouble == "wait") {
      system.activationScripts.trouble = "until [ -e /run/scenario-go ]; do sleep 0.1; done";
    })
    (lib.mkIf (trouble == "reboot") {
      system.extraSystemBuilderCmds = "echo another > $out/init-interface-version";
    })
  ];
}
