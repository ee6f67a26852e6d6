# The user that owns the repository is hostile: whatever it puts where root looks, root's pen and
# root's eye are not lent to it.
{
  # holds a run while the user changes things: see src/fault.rs
  faultPoints = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances.app = (import ./deployment.nix).instance;
    };
  };
}
