# Strangers do what they can to the webhook, while somebody with a token goes on as always.
{
  nodes.attacker = { };
  nodes.client = { };
  nodes.server = {
    services.ekiben = {
      enable = true;
      webhook = {
        enable = true;
        host = "0.0.0.0";
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
    networking.firewall.allowedTCPPorts = [ 8787 ];
  };
}
