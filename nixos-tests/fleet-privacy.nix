# What a host of a fleet can do at its hub besides fetching what is its own and leaving reports:
# nothing. Every attempt is made for real, with OpenSSH's own programs and with requests of our own.
let
  inherit (import ./fleet-keys.nix)
    db
    other
    publisher
    web
    ;
  keys = {
    a = web;
    b = db;
    alice = other;
  };
  client = name: {
    environment.etc."scenario/key".text = keys.${name}.private;
  };
in
{
  nodes.a = client "a";
  nodes.b = client "b";
  nodes.hub =
    { lib, ... }:
    {
      services.ekiben.hub = {
        enable = true;
        repository = "/srv/fleet";
        publishers = [ publisher.public ];
        hosts.a.publicKey = keys.a.public;
        hosts.b.publicKeys = [ keys.b.public ];
        hosts.a.files."/var/lib/secrets/a" = {
          source = "/root/secrets/a";
          owner = "app";
        };
        hosts.b.files."/var/lib/secrets/b".source = "/root/secrets/b";
        reports.size = "4M";
        reports.files = 64;
      };

      # what an administrator has besides
      services.openssh = {
        ports = [
          22
          2222
        ];
        settings = {
          AllowUsers = [ "alice" ];
          PasswordAuthentication = true;
          TrustedUserCAKeys = "/etc/scenario/authority";
          # or the hub would hang up on an attacker before it has tried everything
          PerSourcePenalties = "no";
        };
        extraConfig = lib.mkAfter ''
          Match User alice
            PermitTunnel yes
        '';
      };
      users.users.alice = {
        isNormalUser = true;
        uid = 1001;
        group = "users";
        openssh.authorizedKeys.keys = [ keys.alice.public ];
      };
      environment.etc = {
        "scenario/key-publisher".text = publisher.private;
        "scenario/key-alice".text = keys.alice.private;
        "scenario/authority".text = keys.alice.public;
      };
    };
}
