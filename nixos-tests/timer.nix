# Without a webhook, the timer deploys what is new, and leaves alone what is not.
{
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances = {
        # often enough for a test
        often = {
          flakePath = "/var/nixos-config";
          user = "deploy";
          inputs = [ "app" ];
          dates = "*:*:0/2";
        };
        # seldom enough that only a run that was missed can come about
        seldom = {
          flakePath = "/var/nixos-config";
          user = "deploy";
          inputs = [ "other" ];
          dates = "*-01-01 04:40";
        };
      };
    };
  };
}
