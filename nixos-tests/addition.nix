# What a virtual machine's flake adds to the machine from its inputs: the contents of `app` and
# `other` show in /etc, and a file `trouble` in `app` breaks the system in the way it names.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.scenario;
  read = input: lib.fileContents "${input}/content";
  trouble =
    if builtins.pathExists "${cfg.app}/trouble" then lib.fileContents "${cfg.app}/trouble" else "none";
in
{
  options.scenario = {
    revision = lib.mkOption { };
    app = lib.mkOption { };
    other = lib.mkOption { };
  };
  config = lib.mkMerge [
    {
      environment.etc = {
        app.text = read cfg.app;
        other.text = read cfg.other;
        revision.text = cfg.revision;
      };
    }
    (lib.mkIf (trouble == "evaluation") {
      environment.etc.trouble.text = throw "trouble in evaluation";
    })
    (lib.mkIf (trouble == "build") {
      environment.etc.trouble.source = pkgs.runCommand "trouble" { } "echo trouble in build >&2; exit 1";
    })
  ];
}
