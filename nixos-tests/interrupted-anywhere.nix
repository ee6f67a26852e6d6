# A run of which any file operation goes wrong, in any way, ends in one of the two states of `interrupted`.
{
  # only there can the file operations of a program go wrong at will
  onlyHosts = true;
  fileFaults = true;
  nodes.machine = {
    services.ekiben = {
      enable = true;
      instances.app = (import ./deployment.nix).instance // {
        pull = true;
        push = true;
        networkRetries = 0;
      };
    };
  };
}
