# A machine whose next system changes what deploys it: Ekiben itself, the units and options of the
# instance that runs, or that there is one.
let
  inherit (import ./deployment.nix) instance project;
in
{
  # holds a run while something else happens: see src/fault.rs
  faultPoints = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        projects = {
          app = project;
          other = {
            tokenFile = "/etc/scenario/token-other";
            instance = "other";
          };
        };
      };
      instances = {
        app = instance;
        other = instance // {
          inputs = [ "other" ];
        };
      };
    };
    users.users.successor = {
      isNormalUser = true;
      uid = 1001;
      group = "users";
    };
  };

  variants.machine = rec {
    # another file, at another place, of the same program
    binary.scenario.otherBinary = true;
    options.services.ekiben.instances.app = {
      timeouts.build = 4000;
      author = "Another <another@example.org>";
      healthChecks.app.command = "true";
    };
    # lines before and after the one that runs
    stages.systemd.services.ekiben-app.serviceConfig = {
      ExecStartPre = "/bin/sh -c true";
      ExecStartPost = "/bin/sh -c true";
      UMask = "0077";
    };
    user =
      { lib, ... }:
      {
        services.ekiben.instances.app.user = lib.mkForce "successor";
      };
    path.systemd.paths.ekiben-app.pathConfig.TriggerLimitBurst = 100;
    timer =
      { lib, ... }:
      {
        services.ekiben.instances.app.dates = lib.mkForce "03:00";
      };
    socket.services.ekiben.webhook.port = 8788;
    removed =
      { lib, ... }:
      {
        services.ekiben.instances = lib.mkForce { other = instance; };
        services.ekiben.webhook.projects.app.instance = lib.mkForce "other";
      };
    # what is left of it is a setting of its unit
    odd = {
      imports = [ removed ];
      systemd.services.ekiben-app.serviceConfig.Nice = 19;
    };
    renamed =
      { lib, ... }:
      {
        services.ekiben.instances = lib.mkForce {
          renamed = instance;
          other = instance;
        };
        services.ekiben.webhook.projects.app.instance = lib.mkForce "renamed";
      };
    disabled =
      { lib, ... }:
      {
        services.ekiben.enable = lib.mkForce false;
      };
  };
}
