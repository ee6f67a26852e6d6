# The flake of a machine. What its NixOS is says system.nix: beside this file the stand-in of a host; a
# virtual machine's is in nixos-tests/virtual-machine.nix.
{
  inputs = {
    app = {
      url = "git+file:///srv/app";
      flake = false;
    };
    other = {
      url = "git+file:///srv/other";
      flake = false;
    };
  };
  outputs =
    {
      self,
      app,
      other,
    }:
    let
      system =
        name:
        import ./system.nix {
          inherit app other name;
          revision = self.rev or "none";
        };
    in
    {
      nixosConfigurations = builtins.listToAttrs (
        map
          (name: {
            inherit name;
            value = system name;
          })
          [
            "machine"
            "server"
            "web"
          ]
      );
    };
}
