# The hub's command line, with hosts of all kinds in one repository. What hosts would send, the script
# writes where they would.
{
  # what it builds is for Debian's shell
  onlyHosts = true;
  nodes.hub =
    { config, ... }:
    {
      environment.systemPackages = [ config.services.ekiben.package ];
      systemd.tmpfiles.rules = [ "d /srv/fleet 0755 deploy users -" ];
    };
}
