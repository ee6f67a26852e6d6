# No request is lost, however many there are and whatever restarts in between.
{
  nodes.client = { };
  nodes.server = (import ./deployment.nix).server;
}
