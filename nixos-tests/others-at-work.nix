# A run is not alone: other instances, an administrator at work, repositories of all kinds.
let
  inherit (import ./deployment.nix) instance;
in
{
  # holds a run while something else happens: see src/fault.rs
  faultPoints = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances = {
        app = instance;
        other = instance // {
          inputs = [ "other" ];
        };
        # another repository, in a home
        second = instance // {
          flakePath = "/home/deploy/second";
        };
        # what is there is never fit
        odd = instance // {
          flakePath = "/srv/odd";
        };
      };
    };
  };
}
