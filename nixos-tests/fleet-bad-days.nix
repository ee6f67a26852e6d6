# What can go wrong between a hub and its hosts, and with what the hub publishes.
let
  keys = import ./fleet-keys.nix;
in
{
  nodes.hub = {
    services.openssh.enable = true;
    environment.etc = {
      "scenario/host-key".text = keys.hub.private;
      "scenario/signer".text = keys.signer.private;
      "scenario/other".text = keys.other.private;
      "scenario/web.pub".text = keys.web.public;
    };
  };
  nodes.web = {
    services.ekiben.fleet = {
      enable = true;
      hub = [
        # a hub that is down
        {
          host = "hub";
          port = 2222;
          hostKey = keys.hub.public;
        }
        {
          host = "hub";
          hostKey = keys.hub.public;
        }
      ];
      identityFile = "/root/identity";
      signers = [ keys.signer.public ];
      dates = null;
    };
    environment.etc."scenario/identity".text = keys.web.private;
  };
}
