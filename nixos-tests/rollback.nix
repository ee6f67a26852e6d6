# Whatever goes wrong in a run, wherever it does: it is as if nothing had happened, but for the report.
let
  common = (import ./deployment.nix).instance // {
    networkRetries = 2;
    healthChecks = {
      # ignored: it did not pass before
      never.command = "false";
      app = {
        # as a program that is not served any more says it, and as the network would; or as one that takes its time
        command = ''
          ! grep sick /etc/app || { echo Connection refused; false; } || exit
          if grep patient /etc/app; then
            touch /run/scenario-checked
            until systemctl is-failed scenario-trouble.service; do sleep 0.1; done
          fi
        '';
        retries = 1;
      };
      network = {
        command = "ping -c 1 -W 1 client";
        retries = 1;
      };
    };
  };
in
{
  nodes.client = { };
  nodes.server =
    { config, ... }:
    {
      services.ekiben = {
        enable = true;
        instances = {
          app = common;
          # limits that are to be met, each by itself: the other stages may take as long as they like
          hasty-build = common // {
            timeouts.build = 10 * config.scenario.patience;
          };
          hasty-activation = common // {
            timeouts.activate = 6 * config.scenario.patience;
          };
          lenient = common // {
            onUnitFailure = "keep";
          };
          onward = common // {
            rollback = false;
          };
        };
      };
      systemd = {
        services = {
          # broken, unless it is told to be calm
          scenario-flaky = {
            unitConfig.ConditionPathExists = "!/run/scenario-calm";
            wantedBy = [ "multi-user.target" ];
            serviceConfig = {
              Type = "oneshot";
              ExecStart = "/bin/sh -c 'exit 1'";
            };
          };
          # what this machine is there for
          scenario-daemon = {
            wantedBy = [ "multi-user.target" ];
            unitConfig.StartLimitIntervalSec = 0;
            serviceConfig.ExecStart = "/bin/sh -c 'exec sleep infinity'";
          };
          scenario-clock.serviceConfig = {
            Type = "oneshot";
            ExecStart = "/bin/sh -c true";
          };
        };
        timers.scenario-clock = {
          wantedBy = [ "timers.target" ];
          timerConfig.OnCalendar = "yearly";
        };
      };
    };
}
