# A POST with a project's token deploys that project's instance, and nothing else does.
{
  nodes.client = { };
  nodes.server = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        host = "0.0.0.0";
        projects = {
          app = {
            tokenFile = "/etc/scenario/token-app";
            extraTokenFiles = [ "/etc/scenario/token-next" ];
            instance = "app";
          };
          # a second project may start the same instance
          ci = {
            tokenFile = "/etc/scenario/token-ci";
            instance = "app";
          };
          other = {
            tokenFile = "/etc/scenario/token-other";
            instance = "other";
          };
        };
      };
      instances = {
        app = (import ./deployment.nix).instance;
        other = (import ./deployment.nix).instance // {
          inputs = [ "other" ];
        };
      };
    };
    networking.firewall.allowedTCPPorts = [ 8787 ];
  };
}
