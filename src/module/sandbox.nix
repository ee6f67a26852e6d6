# What the module has all parts' services have in common: programs, pauses, sandboxes.
{
  config,
  lib,
  pkgs,
}:
let
  inherit (config.boot.loader) efi grub systemd-boot;
  inherit (config.services.ekiben) fleet;
in
rec {
  programs = [
    config.nix.package
    config.programs.ssh.package
    pkgs.gitMinimal
    pkgs.gnutar
    pkgs.gzip
    pkgs.util-linux
    pkgs.xz
  ]
  # its grub-editenv
  ++ lib.optional grub.enable pkgs.grub2
  # what fetches releases from a store
  ++ lib.optional (
    fleet.enable && lib.any (server: server.url != null) (lib.toList fleet.hub)
  ) pkgs.curl;

  # where bootctl finds the boot loader's partitions
  bootEnvironment = lib.optionalAttrs systemd-boot.enable (
    {
      SYSTEMD_ESP_PATH = efi.efiSysMountPoint;
    }
    // lib.optionalAttrs (systemd-boot.xbootldrMountPoint != null) {
      SYSTEMD_XBOOTLDR_PATH = systemd-boot.xbootldrMountPoint;
    }
  );

  # a plain configuration.nix is for the Nixpkgs of this machine
  nixPath = lib.filterAttrs (name: _: name == "NIX_PATH") config.environment.sessionVariables;

  # + is root without the sandbox, but not without TemporaryFileSystem=, BindReadOnlyPaths= and PrivateIPC=
  asRoot = "+${lib.getExe' pkgs.util-linux "nsenter"} --target 1 --mount --root --wd --ipc ${lib.getExe config.services.ekiben.package}";

  growingPauses = first: last: {
    RestartSec = first;
    RestartSteps = 4;
    RestartMaxDelaySec = last;
  };

  # systemd itself restarts services only
  insistent.OnFailure = "ekiben-restart@%n.service";

  # for everything that is not root's
  sandbox = {
    AmbientCapabilities = "";
    # "", not [ ]: an empty list is rendered as no line at all, and drops nothing
    CapabilityBoundingSet = "";
    KeyringMode = "private";
    LockPersonality = true;
    MemoryDenyWriteExecute = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    # instead of RemoveIPC=, which would remove what the user has outside, too
    PrivateIPC = true;
    PrivateTmp = true;
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = [
      "@system-service"
      "~@privileged"
    ];
  };

  # for what fetches as the user
  networkSandbox = sandbox // {
    # SSH keys, .netrc and git configuration are there
    ProtectHome = "read-only";
    # The user's systemd, D-Bus, containers and whatever else starts a program for who asks by a socket would do so
    # outside: of /run, there is only what resolves names, and what secrets managers and nix.conf put there.
    TemporaryFileSystem = [
      "/dev/mqueue"
      "/dev/shm"
      "/run:ro"
    ];
    BindReadOnlyPaths = map (path: "-/run/${path}") [
      "NetworkManager/resolv.conf"
      "agenix"
      "agenix.d"
      "booted-system"
      "current-system"
      "keys"
      "nscd"
      "resolvconf"
      "secrets"
      "secrets.d"
      "systemd/resolve"
    ];
    InaccessiblePaths = "/dev/pts";
    # the user's processes outside cannot be traced, nor their memory, files and root directories be opened
    PrivateUsers = true;
    # netlink: the resolver sorts addresses by it
    RestrictAddressFamilies = [
      "AF_UNIX"
      "AF_INET"
      "AF_INET6"
      "AF_NETLINK"
    ];
  };

  # for oneshot services that need no network
  offlineSandbox = sandbox // {
    Type = "oneshot";
    IPAddressDeny = "any";
    PrivateNetwork = true;
    ProtectHome = true;
    # not even systemd's own socket, or root would be root
    RestrictAddressFamilies = "none";
    TimeoutStartSec = "10min";
  };
}
