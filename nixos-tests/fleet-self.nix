# What a host of a fleet does besides following its hub: it updates inputs by itself, reboots where that
# is needed, and asks at once when somebody at it says so.
let
  inherit (import ./fleet-machines.nix) host hub;
  inherit (import ./fleet-keys.nix) signer;
in
{
  nodes.hub = hub [ "web" ];
  nodes.web = {
    imports = [ (host "web") ];
    services.ekiben.fleet = {
      selfUpdate.enable = true;
      reboot = {
        when = "needed";
        # all day: the script has a clock of its own for what is outside of it
        window = {
          lower = "00:00";
          upper = "24:00";
        };
        kexec = true;
      };
    };
    # for whoever pushes
    services.openssh.enable = true;
    users.users.root.openssh.authorizedKeys.keys = [ signer.public ];
    # may update the machine, and see how it goes
    users.users.alice = {
      isNormalUser = true;
      uid = 1001;
      extraGroups = [
        "ekiben"
        "systemd-journal"
      ];
    };
  };
}
