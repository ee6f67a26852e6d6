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
        projects.app = (import ./deployment.nix).project;
      };
      instances.app = (import ./deployment.nix).instance;
    };
    networking.firewall.allowedTCPPorts = [ 8787 ];
  };
}
