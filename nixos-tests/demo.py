def tell(text):
    print(f"\n\033[1m{text}\033[0m", flush=True)


def show(command):
    print(f"  $ {command}", flush=True)
    for line in machine.execute(command)[1].strip().split("\n"):
        print(f"  {line}", flush=True)


machine.start()
install(machine)
machine.wait_for_open_port(8787)

tell("This machine runs what its flake in /var/nixos-config says. The flake has an input, app:")
show("cat /etc/app")
show("git -c safe.directory='*' -C /var/nixos-config log --oneline")

tell("Somebody pushes a new version of app, and its CI job rings the bell:")
publish(machine, "app", "hello")
show("curl -fsS -X POST -H 'Authorization: Bearer token-app-0123456789' http://127.0.0.1:8787/ekiben")
wait_for_run(machine, "app", 0)

tell("The machine has updated that input, built and activated its next generation, and committed the lock file:")
show("cat /etc/app")
show("git -c safe.directory='*' -C /var/nixos-config log --oneline")
show("ekiben status app")
check_deployed(machine, "app")
assert shows(machine, "app") == "hello"

tell("The next version does not build:")
publish(machine, "app", "broken", trouble="build")
before = (digest(machine), generation(machine), running(machine))
show("curl -fsS -X POST -H 'Authorization: Bearer token-app-0123456789' http://127.0.0.1:8787/ekiben")
wait_for_run(machine, "app", 1)
show("ekiben status app")

tell("The machine is as it was: system, profile, branch and working tree.")
assert (digest(machine), generation(machine), running(machine)) == before
assert last_run(machine, "app")["result"] == "failed"
show("cat /etc/app")
show("git -c safe.directory='*' -C /var/nixos-config log --oneline")

tell("Once it is mended, the next ring deploys it.")
publish(machine, "app", "mended")
show("curl -fsS -X POST -H 'Authorization: Bearer token-app-0123456789' http://127.0.0.1:8787/ekiben")
wait_for_run(machine, "app", 2)
show("cat /etc/app")
check_deployed(machine, "app")
