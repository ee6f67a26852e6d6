# What a hub shows of its fleet to a browser and to Prometheus. What hosts would send, the script writes where they would.
{
  # what looks at it is Debian's
  onlyHosts = true;
  debianPackages = [
    "prometheus"
    "tidy"
    "chromium"
    "fonts-dejavu-core"
  ];
  nodes.hub = {
    imports = [
      ((import ./fleet-machines.nix).hub [
        "db"
        "plain"
        "web"
      ])
    ];
    environment.etc."scenario/manual".text = builtins.readFile ../src/fleet/README.md;
    services.ekiben.hub = {
      metrics = "/var/lib/node-exporter-fleet/fleet.prom";
      statusPage = "/var/lib/ekiben-page/index.html";
      reports.interval = "1s";
    };
  };
}
