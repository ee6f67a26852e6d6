# What goes wrong in the time after a switch goes wrong as if it had at once.
let
  inherit (import ./deployment.nix) instance project;
  machine.services.ekiben = {
    enable = true;
    instances.app = instance // {
      # the flake of all scenarios has this one
      flakeRef = "/var/nixos-config#server";
      # more than the longest that anything here takes to die
      observe = 25;
      healthChecks.app = {
        # as a program that gives up some time after it has begun
        command = "! grep sick /etc/app || test ! -e /run/scenario-late";
        retries = 0;
      };
    };
    webhook = {
      enable = true;
      projects.app = project;
    };
  };
in
{
  # of a real NixOS it would show nothing that rollback does not, and takes its time
  onlyHosts = true;
  debianPackages = [ "libfaketime" ];
  # each sees something else, all at the same time
  nodes = {
    early = machine;
    late = machine;
    restarted = machine;
    again = machine;
    sick = machine;
  };
}
