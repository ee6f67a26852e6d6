# The webhook behind a proxy, over a Unix socket.
{
  nodes.client = { };
  nodes.server =
    { pkgs, ... }:
    {
      services.ekiben = {
        enable = true;
        webhook = {
          enable = true;
          nginx = "server";
          projects.app = (import ./deployment.nix).project;
        };
        instances.app = (import ./deployment.nix).instance;
      };
      services.nginx.enable = true;
      networking.firewall.allowedTCPPorts = [ 80 ];
      environment.systemPackages = [ pkgs.curl ];
    };
}
