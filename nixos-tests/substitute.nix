# A small machine that builds nothing follows a CI that fills a binary cache.
let
  inherit (import ./deployment.nix) instance;
  follower = instance // {
    inputs = null;
    pull = true;
    build = "substitute";
  };
in
{
  onlyHosts = true;
  nodes.ci.networking.firewall.allowedTCPPorts = [
    8000
    8001
  ];
  nodes.server = {
    services.ekiben = {
      enable = true;
      instances = {
        app = follower;
        hasty = follower // {
          timeouts.build = 4;
        };
      };
    };
    users.users.member.isNormalUser = true;
  };
}
