# What a host of a fleet can do at its hub besides fetching what is its own and leaving reports:
# nothing. Every attempt is made for real, with OpenSSH's own programs and with requests of our own.
#
# The keys are of this test, and in use nowhere else.
let
  keys = {
    a = {
      public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFS9JUPFloO1Ix1VHDJqys5fYWn32D/tiuEH25/2yMRZ a of a test";
      private = ''
        -----BEGIN OPENSSH PRIVATE KEY-----
        b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
        QyNTUxOQAAACBUvSVDxZaDtSMdVRwyasrOX2Fp99g/7YrhB9uf9sjEWQAAAJAB0H3cAdB9
        3AAAAAtzc2gtZWQyNTUxOQAAACBUvSVDxZaDtSMdVRwyasrOX2Fp99g/7YrhB9uf9sjEWQ
        AAAEDAEZ0fct2t6HpGouh8D37yZS0OIUmuKdYB6uYi9Leo5FS9JUPFloO1Ix1VHDJqys5f
        YWn32D/tiuEH25/2yMRZAAAAC2Egb2YgYSB0ZXN0AQI=
        -----END OPENSSH PRIVATE KEY-----
      '';
    };
    b = {
      public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJsUKuus6vIGgCP3lCRF59MxF3o2w2QNCNRMgnKpPaM2 b of a test";
      private = ''
        -----BEGIN OPENSSH PRIVATE KEY-----
        b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
        QyNTUxOQAAACCbFCrrrOryBoAj95QkRefTMRd6NsNkDQjUTIJyqT2jNgAAAJB4/YUieP2F
        IgAAAAtzc2gtZWQyNTUxOQAAACCbFCrrrOryBoAj95QkRefTMRd6NsNkDQjUTIJyqT2jNg
        AAAEA/OAF6fuyFg+bCN9JuMjWf6YM+0CxyqpX84z/6fuurl5sUKuus6vIGgCP3lCRF59Mx
        F3o2w2QNCNRMgnKpPaM2AAAAC2Igb2YgYSB0ZXN0AQI=
        -----END OPENSSH PRIVATE KEY-----
      '';
    };
    alice = {
      public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAdu21nEBopxQF4sh5a4z320c84glmfm5Mn0rJ2NocfI alice of a test";
      private = ''
        -----BEGIN OPENSSH PRIVATE KEY-----
        b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW
        QyNTUxOQAAACAHbttZxAaKcUBeLIeWuM99tHPOIJZn5uTJ9KydjaHHyAAAAJiqNRn/qjUZ
        /wAAAAtzc2gtZWQyNTUxOQAAACAHbttZxAaKcUBeLIeWuM99tHPOIJZn5uTJ9KydjaHHyA
        AAAEA1/Y/nAY/S+yrLX7xFEZTlMTSBLsdd+xYuPglWCx6hiAdu21nEBopxQF4sh5a4z320
        c84glmfm5Mn0rJ2NocfIAAAAD2FsaWNlIG9mIGEgdGVzdAECAwQFBg==
        -----END OPENSSH PRIVATE KEY-----
      '';
    };
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
        "scenario/key-alice".text = keys.alice.private;
        "scenario/authority".text = keys.alice.public;
      };
    };
}
