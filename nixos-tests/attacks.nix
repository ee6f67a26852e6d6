# Strangers do what they can to the webhook, while somebody with a token goes on as always.
{
  nodes.attacker = { };
  nodes.client = { };
  nodes.server = (import ./deployment.nix).server;
}
