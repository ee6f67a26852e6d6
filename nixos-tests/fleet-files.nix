# What the hub has for a single host besides its configuration, such as secrets, from the hub's disk to
# the service that needs it; and what a hub in wrong hands can do with that.
let
  inherit (import ./fleet-machines.nix) collectsWhenTold;
  keys = import ./fleet-keys.nix;
  app = {
    users.users.app = {
      isSystemUser = true;
      group = "app";
    };
    users.groups.app = { };
  };
in
{
  # root can be cut off between two file operations
  fileFaults = true;
  nodes.hub = {
    imports = [ collectsWhenTold ];
    services.ekiben.hub = {
      enable = true;
      hosts.web = {
        publicKey = keys.web.public;
        files = {
          "/var/lib/secrets/plain".source = "/root/secrets/plain";
          "/var/lib/secrets/deep/er/token" = {
            source = "/root/secrets/token";
            mode = "0440";
            owner = "app";
            group = "app";
          };
          "/run/fleet-secrets/volatile".source = "/root/secrets/volatile";
        };
      };
    };
    environment.etc."scenario/host-key".text = keys.hub.private;
  };
  nodes.web = {
    services.ekiben.fleet = {
      enable = true;
      hub = {
        host = "hub";
        hostKey = keys.hub.public;
      };
      identityFile = "/root/identity";
      fileDirectories = [
        "/var/lib/secrets"
        "/run/fleet-secrets"
      ];
      dates = null;
    };
    # a test need not wait long
    services.ekiben.instances.fleet.networkRetries = 1;
    environment.etc."scenario/identity".text = keys.web.private;
  };

  # a system whose services need a file, and with it the user that it belongs to
  variants.web.app = {
    imports = [ app ];
    systemd.services.scenario-reader = {
      wantedBy = [ "multi-user.target" ];
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        User = "app";
        ExecStart = "/bin/sh -c 'read token < /var/lib/secrets/deep/er/token; echo The token is $$token.'";
      };
    };
  };
}
