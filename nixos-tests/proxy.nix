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
          caddy = "caddy.example.org";
          projects.app = {
            tokenFile = "/etc/scenario/token-app";
            instance = "app";
          };
        };
        instances.app = {
          flakePath = "/var/nixos-config";
          user = "deploy";
          inputs = [ "app" ];
          dates = null;
        };
      };
      services.nginx.enable = true;
      networking.firewall.allowedTCPPorts = [ 80 ];
      environment.systemPackages = [ pkgs.curl ];
    };
}
