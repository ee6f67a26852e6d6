# What the machines of the scenarios deploy by, unless it is what a scenario is about.
rec {
  instance = {
    flakePath = "/var/nixos-config";
    user = "deploy";
    inputs = [ "app" ];
    dates = null;
  };
  # starts the instance `app`
  project = {
    tokenFile = "/etc/scenario/token-app";
    instance = "app";
  };
  # for strangers, too
  server = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        host = "0.0.0.0";
        projects.app = project;
      };
      instances.app = instance;
    };
    networking.firewall.allowedTCPPorts = [ 8787 ];
  };
}
