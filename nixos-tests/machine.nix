# What the machines of all scenarios have in common, on virtual machines and on hosts.
{ config, lib, ... }:
{
  # what takes time is for those that it is the subject of
  options.services.ekiben.instances = lib.mkOption {
    type = lib.types.attrsOf (
      lib.types.submodule {
        observe = lib.mkDefault 0;
      }
    );
  };
  options.scenario = {
    patience = lib.mkOption {
      default = 1;
      description = "How many times longer than on a host things take.";
    };
    builds = lib.mkOption {
      default = lib.optional config.services.ekiben.enable config.networking.hostName;
      description = "The machines whose systems it builds.";
    };
    faultPoints = lib.mkOption {
      default = false;
      description = "Whether runs can be held, see src/fault.rs.";
    };
    otherBinary = lib.mkOption {
      default = false;
      description = "Whether Ekiben's program is the same at another place.";
    };
  };

  config = {
    services.ekiben.fleet.observe = lib.mkDefault 0;
    systemd.services = lib.mkIf (config.scenario.faultPoints && config.services.ekiben.enable) (
      lib.mapAttrs' (
        name: _:
        lib.nameValuePair "ekiben-${name}" {
          serviceConfig.BindReadOnlyPaths = [ "/run:/var/lib/ekiben/root" ];
        }
      ) config.services.ekiben.instances
    );
    users.users.deploy = {
      isNormalUser = true;
      uid = 1000;
      group = "users";
    };
    systemd.tmpfiles.rules = map (directory: "d ${directory} 0755 deploy users -") [
      "/srv/app"
      "/srv/other"
      "/var/nixos-config"
    ];
    # of a test, so they may lie in the store
    environment.etc =
      lib.genAttrs
        (map (name: "scenario/token-${name}") [
          "app"
          "ci"
          "next"
          "other"
        ])
        (file: {
          text = "${baseNameOf file}-0123456789\n";
        });
  };
}
