# A host's NixOS is a stand-in: a system is a directory of a few files that says what `app` and `other`
# say, and a switch-to-configuration that breaks in the way that the file `trouble` of `app` names.
{
  app,
  other,
  name,
  revision,
}:
let
  said =
    what: default:
    if builtins.pathExists (app + "/${what}") then
      builtins.replaceStrings [ "\n" ] [ "" ] (builtins.readFile (app + "/${what}"))
    else
      default;
  trouble = said "trouble" "none";
  variant = said "variant" "default";
  # a package that is of another version
  version = said "version" "";
  package = if version == "" then "" else builtins.toFile "app-${version}" version;
  # as `specialisation.night`, which says so in /etc/night
  night = if trouble == "specialised" then make "" "night" else "";
  make =
    night: special:
    derivation {
      name = "nixos-system-${name}-stand-in";
      system = "@system@";
      builder = "/bin/sh";
      PATH = "/usr/bin";
      inherit
        app
        other
        night
        package
        revision
        special
        trouble
        ;
      switch = ./switch-to-configuration;
      etc = ./systems + "/${variant}/etc";
      args = [
        "-euc"
        ''
          case $trouble in
            build) echo "trouble in build" >&2; exit 1 ;;
            build-hangs) sleep 3600 ;;
          esac
          mkdir -p $out/bin
          cp -r $etc $out/etc
          chmod u+w $out/etc
          cp $switch $out/bin/switch-to-configuration
          chmod +x $out/bin/switch-to-configuration
          ln -s bin/switch-to-configuration $out/activate
          cp $app/content $out/etc/app
          cp $other/content $out/etc/other
          echo $revision > $out/etc/revision
          [ -z "$package" ] || ln -s $package $out/etc/package
          [ -z "$special" ] || echo > $out/etc/$special
          [ -z "$night" ] || { mkdir $out/specialisation; ln -s $night $out/specialisation/night; }
          echo $trouble > $out/trouble
          echo stand-in > $out/nixos-version
          [ $trouble = reboot ] && echo 2 > $out/init-interface-version || echo 1 > $out/init-interface-version
          # as since 26.05
          case $trouble in
            inhibitor) echo '{ "dbus-implementation": "broker", "new": "1" }' ;;
            *) echo '{ "dbus-implementation": "dbus" }' ;;
          esac > $out/switch-inhibitors
          units=$out/etc/systemd/system
          chmod -R u+w $out/etc
          case $trouble in
            unit) printf '[Service]\nType=oneshot\nExecStart=false\n[Install]\nWantedBy=multi-user.target\n' > $units/scenario-trouble.service ;;
            mortal*)
              set -- $trouble
              printf '%s\n' [Unit] StartLimitIntervalSec=0 [Service] "ExecStart=/bin/sh -c 'sleep $2; exit $3'" Restart=$4 RestartSec=0 \
                [Install] WantedBy=multi-user.target > $units/scenario-trouble.service
              ;;
            unit-again) sed -i "s/^\\[Service\\]/&\\nRestart=always\\nRestartSec=0\\nExecStartPre=\\/bin\\/sh -c 'sleep 5; exit 1'/" $units/scenario-daemon.service ;;
            daemon) sed -i 's/^\[Service\]/&\nEnvironment=CHANGED=1/' $units/scenario-daemon.service ;;
            unit-broken) sed -i 's/^ExecStart=.*/ExecStart=/' $units/scenario-daemon.service ;;
            unit-requires) sed -i 's/^\[Unit\]/&\nRequires=scenario-missing.service/' $units/scenario-daemon.service ;;
            restart) sed -i 's/^\[Unit\]/&\nRequires=scenario-missing.service/; s/^\[Service\]/&\nX-StopIfChanged=false/' \
              $units/scenario-daemon.service ;;
            reload) sed -i 's/^\[Service\]/&\nX-ReloadIfChanged=true\nExecReload=false/' $units/scenario-daemon.service ;;
            checked)
              printf '%s\n' [Service] "ExecStart=/bin/sh -c 'until test -e /run/scenario-checked; do sleep 0.1; done; sleep 2; exit 1'" \
                [Install] WantedBy=multi-user.target > $units/scenario-trouble.service
              ;;
            lingers)
              # the switch ends when its last command is under way
              printf '%s\n' [Service] Type=exec ExecStart=false "ExecStopPost=/bin/sh -c 'exec sleep 5'" [Install] WantedBy=multi-user.target \
                > $units/scenario-trouble.service
              printf '%s\n' [Service] Type=oneshot \
                "ExecStart=/bin/sh -c 'until systemctl show scenario-trouble.service | grep ^SubState=stop-post; do sleep 0.1; done'" \
                [Install] WantedBy=multi-user.target > $units/scenario-waits.service
              ;;
            upheld)
              # and here when it is started anew
              printf '%s\n' [Service] Type=oneshot "ExecStart=/bin/sh -c 'sleep 3; exit 1'" > $units/scenario-trouble.service
              printf '%s\n' [Unit] Upholds=scenario-trouble.service [Install] WantedBy=multi-user.target > $units/scenario-upholds.target
              printf '%s\n' [Service] Type=oneshot \
                "ExecStart=/bin/sh -c 'while systemctl show scenario-trouble.service | grep ^InactiveEnterTimestampMonotonic=0; do sleep 0.1; done'" \
                [Install] WantedBy=multi-user.target > $units/scenario-waits.service
              ;;
            bound)
              # and here when what it is bound to has done its work, and so it was stopped
              printf '%s\n' [Unit] BindsTo=scenario-bound.service After=scenario-bound.service [Service] "ExecStart=sleep infinity" \
                [Install] WantedBy=multi-user.target > $units/scenario-trouble.service
              printf '%s\n' [Service] Type=exec "ExecStart=/bin/sh -c 'until systemctl is-active scenario-trouble.service; do sleep 0.1; done'" \
                > $units/scenario-bound.service
              printf '%s\n' [Service] Type=oneshot \
                "ExecStart=/bin/sh -c 'until systemctl show scenario-trouble.service | grep ^ActiveExitTimestampMonotonic=[1-9]; do sleep 0.1; done'" \
                [Install] WantedBy=multi-user.target > $units/scenario-waits.service
              ;;
            once | refused)
              printf '%s\n' [Unit] "AssertPathExists=$([ $trouble = once ] && echo / || echo /scenario/missing)" [Service] Type=oneshot ExecStart=true \
                [Install] WantedBy=multi-user.target > $units/scenario-trouble.service
              ;;
            by-hand) printf '%s\n' [Service] "ExecStart=sleep infinity" > $units/scenario-by-hand.service ;;
            unit-condition) sed -i 's/^\[Service\]/&\nExecCondition=false/' $units/scenario-daemon.service ;;
            unit-late) printf '[Unit]\nRequires=scenario-missing.service\n[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n' \
              > $units/scenario-trouble.service ;;
            mount) printf '[Unit]\nBefore=local-fs.target\n[Mount]\nWhat=/dev/scenario\nWhere=/scenario/trouble\n[Install]\nRequiredBy=local-fs.target\n' \
              > $units/scenario-trouble.mount ;;
            mounted | remount | mount-another)
              case $trouble in mounted) set -- tmpfs size=1M ;; remount) set -- tmpfs size=1M,nonsense=1 ;; *) set -- ramfs size=1M ;; esac
              printf '%s\n' [Mount] What=tmpfs Where=/scenario/data Type=$1 Options=$2 [Install] WantedBy=multi-user.target > $units/scenario-data.mount
              ;;
            timer) sed -i 's/^OnCalendar=.*/OnCalendar=on a Sunday/' $units/scenario-clock.timer ;;
          esac
          [ $trouble = no-nixos ] || printf '#!/bin/sh\nexec /sbin/init\n' > $out/init
        ''
      ];
    };
in
if trouble == "evaluation" then
  throw "trouble in evaluation"
else
  rec {
    # what stands in for Nixpkgs takes this for a module
    module = { inherit config; };
    config.system.build.toplevel = make night "";
  }
