# The page of all options, made of what the module says of them; src/options.md is this, committed. An option
# without a description is an error, and so is one that has to be set, but shows no example.
{
  self,
  nixpkgs,
  pkgs,
}:
let
  inherit (nixpkgs) lib;

  inherit
    ((import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = null;
      modules = [
        self.nixosModules.default
        { nixpkgs = { inherit pkgs; }; }
      ];
    }).options.services
    )
    ekiben
    ;

  documented = pkgs.nixosOptionsDoc { options.services = { inherit ekiben; }; };
  options = lib.filterAttrs (name: _: !lib.hasInfix "_module" name) documented.optionsNix;

  wrong = lib.filter (
    name:
    lib.elem (options.${name}.description or null) [
      null
      ""
    ]
    || !(
      options.${name} ? default
      || options.${name} ? example
      || options.${name}.readOnly
      || lib.hasPrefix "Alias of" options.${name}.description
    )
  ) (lib.attrNames options);

  # what Nixpkgs' Markdown has beyond others'
  plain = lib.replaceStrings [ "{command}" "{file}" "{manpage}" "{option}" ] [ "" "" "" "" ];
  value =
    name: value:
    let
      text = lib.removeSuffix "\n" (value.text or (lib.generators.toPretty { } value));
    in
    if lib.hasInfix "\n" text then "\n${name}:\n\n```nix\n${text}\n```" else "\n${name}: `${text}`";

  section =
    name: option:
    lib.concatStringsSep "\n" (
      [
        "## ${lib.removePrefix "services.ekiben." name}\n"
        "${plain (lib.removeSuffix "\n" option.description)}\n"
        "Type: ${lib.removeSuffix "\n" option.type}"
      ]
      # of an alias, there is no more to say
      ++ lib.optional (!(option ? default || option ? example)) ""
      ++ lib.optional (option ? default) (value "Default" option.default)
      # of what is on or off, there is no more to say
      ++ lib.optional (option ? example && option.type != "boolean") (value "Example" option.example)
    );
in
lib.throwIf (wrong != [ ]) "without a description, or an example: ${toString wrong}" (
  pkgs.writeText "ekiben-options.md" (
    "# Options\n\nAll of them are below `services.ekiben`. Made by `nix build .#docs`.\n\n"
    + lib.concatStringsSep "\n\n" (lib.mapAttrsToList section options)
    + "\n"
  )
)
