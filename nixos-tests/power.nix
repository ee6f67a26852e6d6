# A run whose machine loses its power, and all that is not on the disk yet, ends in one of the two states of `interrupted`.
{
  # a virtual machine's disk cannot be looked at in mid-run
  onlyHosts = true;
  fileFaults = true;
  diskImages = true;
  inherit (import ./interrupted-anywhere.nix) nodes;
}
