# The hub's command line, with hosts of all kinds in one repository. What hosts would send, the script
# writes where they would.
{
  nodes.hub =
    { config, ... }:
    {
      environment.systemPackages = [ config.services.ekiben.package ];
      # what it builds is a few lines for the machine's own shell
      nix.settings.sandbox = false;
      systemd.tmpfiles.rules = [ "d /srv/fleet 0755 deploy users -" ];
    };
}
