# Whatever the owner of the repository is in the middle of stays as it is.
{
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances.app = (import ./deployment.nix).instance;
    };
  };
}
