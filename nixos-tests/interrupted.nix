# A run that is cut off at any step, by whatever, ends in one of two states: the new system, with the
# branch on its commit; or the old one, with everything as it was.
{
  # holds a run between two steps: see src/fault.rs
  faultPoints = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances.app = (import ./deployment.nix).instance // {
        healthChecks.app = {
          command = "! grep sick /etc/app";
          retries = 0;
        };
      };
    };
  };
}
