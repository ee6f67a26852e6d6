# The main job, told as a story.
{
  nodes.machine = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        projects.app = {
          tokenFile = "/etc/scenario/token-app";
          instance = "app";
        };
      };
      instances.app = {
        flakePath = "/var/nixos-config";
        user = "deploy";
        inputs = [ "app" ];
      };
    };
  };
}
