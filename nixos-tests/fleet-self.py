start_all()

with subtest("a host is up to date"):
    found_fleet(hub, {web: "web"})
    write(hub, "/srv/fleet/hosts/web/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations.web = {system('web')}; }}; }}")
    hub.succeed(fleet("deploy"))
    assert poll(web)["result"] == "deployed", last_run(web, "fleet")
    becomes(hub, "web", "up to date")

with subtest("an update right now, by a user who is not root, who sees what happens"):
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    said = web.succeed("runuser -u alice -- ekiben trigger --wait fleet 2>&1")
    assert "activating the configuration" in said and said.endswith("The run ended: deployed.\n"), said
    assert shows(web, "app") == content
    change_hosts(hub, "web", trouble="activation")
    hub.succeed(fleet("deploy web"))
    assert "The run ended: rolled back: " in web.fail("runuser -u alice -- ekiben trigger --wait fleet 2>&1")
    web.fail("runuser -u nobody -- ekiben trigger --wait fleet")

with subtest("an update that is pushed, over SSH; the next release is deployed as any other"):
    hub.succeed(as_deploy("mkdir -p -m 700 ~/.ssh; printf 'Host *\\nIdentityFile ~/signer\\nStrictHostKeyChecking accept-new\\n' > ~/.ssh/config"))
    # root's own is not for others to look into
    path = "PATH=/run/current-system/sw/bin:/usr/bin:/bin"
    content = change_hosts(hub, "web")
    before = generation(web)
    hub.succeed(fleet("build test web --target root@web", path))
    assert shows(web, "app") == content and generation(web) == before
    hub.succeed(fleet("build switch web --target root@web", path))
    assert shows(web, "app") == content and generation(web).endswith(running(web))
    if is_host(web):
        # what a check of it refuses is not what is booted next; what only a boot can bring is
        before = (running(web), generation(web))
        change_hosts(hub, "web")
        web.succeed("echo 'not today' > /run/scenario-refuses")
        assert "not today" in hub.fail(fleet("build switch web --target root@web", path))
        assert (running(web), generation(web)) == before
        web.succeed("rm /run/scenario-refuses")
        change_hosts(hub, "web", trouble="reboot")
        assert "won't take effect until you reboot" in hub.fail(fleet("build switch web --target root@web", path))
        assert running(web) == before[0] and generation(web) != before[1]
        change_hosts(hub, "web")
    for wrong in ("switch web --target -oProxyCommand=x", "switch web --target 'a b'", "build web --target root@web", "switch --target root@web"):
        assert "Failed to understand --target" in hub.fail(fleet(f"build {wrong}"))
    assert "copy /nix/store/" in hub.fail(fleet("build switch web --target root@nowhere", path))
    hub.succeed(fleet("deploy web"))
    assert poll(web)["result"] == "deployed", last_run(web, "fleet")
    becomes(hub, "web", "up to date")

with subtest("inputs are updated between releases, and the hub says so"):
    # the hub and the host see the same repository
    hub.succeed(as_deploy("git config --global user.name Deploy; git config --global user.email deploy@localhost; "
                          "git init -qb main /srv/app; cd /srv/app; echo one > content; git add .; git commit -qm one"))
    pack = hub.succeed("tar -C /srv -cz app | base64 -w0").strip()
    web.succeed(f"base64 -d <<< {pack} | tar -C /srv -xz; chown -R ekiben-fleet /srv/app")
    write(hub, "/srv/fleet/hosts/web/flake.nix", f"""{{ inputs.app = {{ url = "git+file:///srv/app"; flake = false; }};
      outputs = {{ self, app }}: {{ nixosConfigurations.web = {system("web").replace("app = ./app;", "inherit app;")}; }}; }}""")
    hub.succeed(fleet("flake-update web"), fleet("deploy web"))
    assert poll(web)["result"] == "deployed", last_run(web, "fleet")
    assert shows(web, "app") == "one"
    becomes(hub, "web", "up to date")
    git = "runuser -u ekiben-fleet -- git -C /srv/app -c user.name=A -c user.email=a@localhost"
    web.succeed(f"echo two > /srv/app/content; {git} commit -qam two")
    assert poll(web)["summary"] == "update app", last_run(web, "fleet")
    assert shows(web, "app") == "two"
    becomes(hub, "web", "auto updated")
    assert poll(web)["result"] == "unchanged", last_run(web, "fleet")
    # a release comes on top, and what it pins is updated again
    write(hub, "/srv/fleet/hosts/web/note", "new")
    hub.succeed(fleet("deploy web"))
    ended = poll(web)
    assert ended["result"] == "deployed" and ended["summary"].endswith(", update app"), ended
    assert shows(web, "app") == "two"
    becomes(hub, "web", "auto updated")

with subtest("what takes a reboot is rebooted into, when it is time for that"):
    web.succeed(f"echo three > /srv/app/content; echo reboot > /srv/app/trouble; {git} add .; {git} commit -qam three")
    ended = poll(web)
    assert ended["result"] == "awaitingBoot" and ended["rebootNeeded"], ended
    becomes(hub, "web", "awaiting boot")
    assert poll(web)["result"] == "awaitingBoot"
    becomes(hub, "web", "awaiting boot")
    assert shows(web, "app") == "two"
    now, later = web.succeed("date +%H:%M").strip(), web.succeed("date +%H:%M -d '+2 hours'").strip()
    for other in (f'.window = {{"lower": "{later}", "upper": "{now}"}}', '.when = "never"'):
        web.succeed(f"jq {shlex.quote(f'.instances.fleet.reboot{other}')} /etc/ekiben/config.json > /root/config.json")
        web.succeed("ekiben --config /root/config.json reboot", "systemctl is-system-running --wait || true")
        assert web.succeed("systemctl list-jobs") == "No jobs running.\n", other
    shares_kernel = web.execute("systemd-detect-virt --container")[0] == 0
    web.succeed("mkdir -p /var/log/journal; journalctl --flush; systemctl start --no-block ekiben-reboot.service")
    if shares_kernel:
        # no other can be loaded: said, and rebooted all the same
        web.wait_for_shutdown()
        web.start()
    else:
        # by kexec, or it would end here
        web.connected = False
        web.wait_for_unit("multi-user.target")
    assert shows(web, "app") == "three"
    said = web.succeed("journalctl -o cat -u ekiben-reboot")
    assert said.count("Rebooting into ") == 1 and ("Failed to start prepare-kexec.service" in said) == shares_kernel, said
    # a container that shares its kernel has no boot of its own to tell from the one before
    if is_host(web) or not shares_kernel:
        web.succeed("chown -R ekiben-fleet /srv/app")
        assert poll(web)["result"] == "unchanged", last_run(web, "fleet")
        becomes(hub, "web", "auto updated")
        # nothing to reboot into
        web.succeed("systemctl start ekiben-reboot.service")
        assert web.succeed("journalctl -o cat -u ekiben-reboot").count("Rebooting into ") == 1

if is_host(web):
    with subtest("whoever boots an older system by hand is not rebooted, however often"):
        links = web.succeed("ls -d /nix/var/nix/profiles/system-*-link | sort -V | tail -n 3").split()
        for old in [web.succeed(f"readlink -f {link}").strip() for link in links]:
            web.crash()
            # by the menu of the boot loader, which the driver of virtual machines does not know
            getattr(web, "start")(choose=old)
            assert running(web) == old
            web.succeed("systemctl start ekiben-reboot.service", "systemctl is-system-running --wait || true")
            assert web.succeed("systemctl list-jobs") == "No jobs running.\n"
        assert web.succeed("journalctl -o cat -u ekiben-reboot").count("Rebooting into ") == 1
