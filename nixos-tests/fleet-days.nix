# The days of a fleet's administrator, by the words of the manual: a publisher's desk, a hub elsewhere, and a machine that
# becomes a host, and what else can become of one.
let
  keys = import ./fleet-keys.nix;
in
{
  # what the hosts run is changed by the script, as only a stand-in's can be
  onlyHosts = true;
  # for a clock that is wrong
  debianPackages = [ "libfaketime" ];
  nodes.desk = (import ./fleet-machines.nix).desk;
  nodes.hub = {
    services.ekiben.hub = {
      enable = true;
      # which of them it has, and with which keys, the script says
      hosts.shop.publicKey = keys.db.public;
      hosts.web.publicKey = keys.web.public;
      publishers = [ keys.publisher.public ];
      reports.interval = "1s";
    };
    environment.etc."scenario/host-key".text = keys.hub.private;
    environment.etc."scenario/other".text = keys.other.private;
  };
  nodes.web = {
    services.ekiben.instances.fleet.networkRetries = 1;
    services.ekiben.fleet = {
      enable = true;
      hub = {
        host = "hub";
        hostKey = keys.hub.public;
      };
      identityFile = "/root/ekiben-identity";
      dates = null;
    };
    # for whoever pushes
    services.openssh.enable = true;
    users.users.root.openssh.authorizedKeys.keys = [
      keys.publisher.public
      keys.alice.public
    ];
  };
}
