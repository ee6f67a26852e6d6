# What a machine does, did and will do can be seen, and who should know is told.
{
  # what looks at what is shown is Debian's
  onlyHosts = true;
  debianPackages = [
    "ntfy"
    "prometheus"
    "python3-aiosmtpd"
  ];
  nodes.machine = {
    # what is recommended there is what is tried here
    environment.etc."scenario/manual".text = builtins.readFile ../src/run/README.md;
    services.ekiben = {
      enable = true;
      metrics = "/var/lib/node-exporter/ekiben.prom";
      webhook = {
        enable = true;
        projects.app = (import ./deployment.nix).project;
      };
      instances.app = (import ./deployment.nix).instance // {
        notify.command = "exec sh /srv/notify";
      };
    };
    users.users.member = {
      isNormalUser = true;
      extraGroups = [ "ekiben" ];
    };
  };
}
