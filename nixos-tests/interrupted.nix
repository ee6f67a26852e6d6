# A run that is cut off at any step, by whatever, ends in one of two states: the new system, with the
# branch on its commit; or the old one, with everything as it was.
{
  # holds a run between two steps: see src/fault.rs
  faultPoints = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances.app = {
        flakePath = "/var/nixos-config";
        user = "deploy";
        inputs = [ "app" ];
        dates = null;
        healthChecks.app = {
          command = "! grep sick /etc/app";
          retries = 0;
        };
      };
    };
  };
}
