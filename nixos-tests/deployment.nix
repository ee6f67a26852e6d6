# What the machines of the scenarios deploy by, unless it is what a scenario is about.
{
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
}
