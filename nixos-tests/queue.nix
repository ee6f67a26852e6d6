# No request is lost, however many there are and whatever restarts in between.
{
  nodes.client = { };
  nodes.server = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        host = "0.0.0.0";
        projects.app = (import ./deployment.nix).project;
      };
      instances.app = (import ./deployment.nix).instance;
    };
    networking.firewall.allowedTCPPorts = [ 8787 ];
  };
}
