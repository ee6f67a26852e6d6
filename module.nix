# The NixOS module: options in, one JSON file and systemd units out, nothing else.
#
# This is the entry. Each part stands in src/, beside the program's side of the same concern.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.ekiben;
  format = pkgs.formats.json { };

  # the program that this one replaces: its configuration works unchanged
  alias =
    option:
    let
      of = service: lib.splitString "." "services.${service}.${option}";
    in
    lib.mkAliasOptionModule (of "patchouli-deployment") (of "ekiben");
in
{
  imports = [
    ./src/run/module.nix
    ./src/webhook/module.nix
    ./src/fleet/host/module.nix
    ./src/fleet/hub/module.nix
  ]
  ++ map alias [
    "enable"
    "instances"
    "webhook.enable"
    "webhook.host"
    "webhook.port"
    "webhook.path"
    "webhook.projects"
  ];

  options.services.ekiben = {
    enable = lib.mkEnableOption "Ekiben, which keeps this machine up to date from the inside";
    package = lib.mkPackageOption pkgs "ekiben" { };
    settings = lib.mkOption {
      inherit (format) type;
      default = { };
      example.instances.web.observe = 300;
      description = ''
        The contents of {file}`/etc/ekiben/config.json`. The other options fill it in, and the program reads nothing else.
        The build fails if the program would refuse it.
      '';
    };
  };

  config = {
    environment = lib.mkIf (cfg.enable || cfg.hub.enable) {
      etc."ekiben/config.json".source = pkgs.runCommand "ekiben-config.json" { } ''
        cp ${format.generate "config.json" cfg.settings} $out
        ${lib.optionalString (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) "${lib.getExe cfg.package} check $out"}
      '';
      systemPackages = [ cfg.package ];
    };
    users.groups = lib.mkIf cfg.enable { ekiben = { }; };
    # as in src/paths.rs
    systemd.tmpfiles.rules = lib.mkIf cfg.enable [
      "d /var/lib/ekiben 0755 root root -"
      # runs may know that a request waits
      "d /var/lib/ekiben/queue 2771 root ekiben -"
      "d /var/lib/ekiben/holds 2775 root ekiben -"
      # sticky: whose file it is says who has asked
      "d /var/lib/ekiben/rollbacks 3775 root ekiben -"
      "d /var/lib/ekiben/runs 0700 root root -"
      "d /var/lib/ekiben/looks 0755 root root -"
      "d /var/lib/ekiben/status 0755 root root -"
      "d /var/lib/ekiben/root 0755 root root -"
    ];
  };
}
