# What only a boot can bring is on trial until it has booted and is well.
let
  instance = (import ./deployment.nix).instance // {
    healthChecks.app = {
      command = "! grep sick /etc/app";
      retries = 0;
    };
  };
  machine.services.ekiben = {
    enable = true;
    instances = {
      app = instance // {
        operation = "boot";
      };
      # the same, at once
      live = instance;
      other = instance // {
        inputs = [ "other" ];
        operation = "boot";
      };
    };
    webhook = {
      enable = true;
      projects.app = (import ./deployment.nix).project;
    };
  };
in
{
  # a virtual machine of a test has no boot loader; see boot-loader for those
  onlyHosts = true;
  # holds a run between two steps: see src/fault.rs
  faultPoints = true;
  # the same between two file operations
  fileFaults = true;
  nodes = {
    inherit machine;
    # the same, with a boot loader that boots a system once
    server = {
      imports = [ machine ];
      services.ekiben.settings.bootLoader = "grub";
    };
  };
}
