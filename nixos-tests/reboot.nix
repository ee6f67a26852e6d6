# Who may have the machine rebooted, when, and how often.
let
  instance = (import ./deployment.nix).instance // {
    operation = "boot";
    healthChecks.app = {
      command = "! grep sick /etc/app";
      retries = 0;
    };
  };
in
{
  # what boots a virtual machine of a test is no boot loader
  onlyHosts = true;
  # a reboot can be cut off between two file operations
  fileFaults = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances = {
        app = instance // {
          allowReboot = true;
        };
        quick = instance // {
          reboot = {
            when = "needed";
            kexec = true;
          };
        };
        # may not
        other = instance // {
          inputs = [ "other" ];
        };
      };
      # the hosts have its files
      settings.bootLoader = "grub";
    };
  };
}
