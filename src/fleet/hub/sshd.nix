# What a host of the fleet, and who publishes from elsewhere, may do at the hub's sshd: SFTP in a directory
# that holds nothing but what is theirs. Whatever is said here is said once more by the keys (`restrict`)
# and by the permissions of the directories, as far as they can.
{ config, lib, ... }:
let
  inherit (config.services.ekiben) hub;

  blocks = ''
    Match Group ekiben-hosts
      ${session requests "0027"}
      # whomever the administrator allows besides
      AllowGroups ekiben-hosts
      AllowUsers fleet-*
      ChrootDirectory %h
      MaxSessions 1
  ''
  + lib.optionalString (hub.publishers != [ ]) ''
    Match User ekiben-publisher
      ${session (requests ++ publisherRequests) "0022"}
      AllowGroups ekiben-publisher
      AllowUsers ekiben-publisher
      ChrootDirectory ${hub.directory}
  ''
  + ''
    Match all
  '';
  session = allowed: mask: ''
    AuthenticationMethods publickey
      PubkeyAuthentication yes
      AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u
      ${lib.optionalString (
        config.services.openssh.authorizedKeysCommand != "none"
      ) "AuthorizedKeysCommand none"}
      TrustedUserCAKeys none
      ${lib.optionalString hasPam "PAMServiceName ${pam}"}
      ForceCommand internal-sftp -u ${mask} -p ${lib.concatStringsSep "," allowed}
      PermitTTY no
      PermitUserRC no
      PermitTunnel no
      DisableForwarding yes
      # OpenSSH 9 does not take the line above for all of these
      AllowAgentForwarding no
      AllowStreamLocalForwarding no
      AllowTcpForwarding no
      X11Forwarding no
      # who is gone must not be waited for
      ClientAliveInterval 15
      ClientAliveCountMax 2'';
  # a session as people have it starts a systemd for its user, outside of the directory, and costs
  # several times as much
  pam = "ekiben-hub";
  hasPam = lib.versionAtLeast (config.services.openssh.package.version
    or config.programs.ssh.package.version
  ) "9.8";
  # what a host needs to fetch, to leave a report, and to put it in its place; anything else,
  # and what later versions of OpenSSH will know, is refused
  requests = [
    "open"
    "close"
    "read"
    "write"
    "opendir"
    "readdir"
    "stat"
    "lstat"
    "fstat"
    "realpath"
    "rename"
    "posix-rename"
    "limits"
  ];
  # what whoever publishes needs besides: that one does at a time, and that it is on the disk
  publisherRequests = [
    "fsync"
    "hardlink"
    "remove"
  ];
in
{
  config = lib.mkIf hub.enable {
    services.openssh = {
      enable = lib.mkDefault true;
      # last of all, since all that follows `Match` belongs to it
      extraConfig = lib.mkOrder 5000 blocks;
    };
    security.pam.services = lib.mkIf hasPam {
      ${pam}.text = ''
        auth required pam_deny.so
        account required pam_unix.so
        password required pam_deny.so
        session required pam_permit.so
      '';
    };
  };
}
