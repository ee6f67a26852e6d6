
start_all()
SERVED = "/var/lib/ekiben-hub/hosts/web"
for machine in (hub, web):
    machine.wait_for_unit("multi-user.target")
hub.succeed("useradd -r -d /var/lib/ekiben-hub/hosts/web -g nogroup -p '*' fleet-web",
  f"mkdir -p {SERVED}/release {SERVED}/reports; chown fleet-web {SERVED}/reports",
  "mkdir -p /etc/ssh/authorized_keys.d; (echo -n 'restrict '; cat /etc/scenario/web.pub) > /etc/ssh/authorized_keys.d/fleet-web",
  "install -m 600 /etc/scenario/host-key /etc/ssh/ssh_host_ed25519_key; install -m 600 /etc/scenario/signer /etc/scenario/other /root",
  "printf 'Match User fleet-web\\n ChrootDirectory %s\\n ForceCommand internal-sftp\\n AuthorizedKeysFile /etc/ssh/authorized_keys.d/%%u\\n' "+SERVED+" > /etc/ssh/sshd_config.d/fleet.conf",
  "systemctl restart sshd")
web.succeed("install -m 600 /etc/scenario/identity /root/identity")
ended = run(web, "fleet")
assert "the hub has none for web yet" in ended["error"], ended

FLAKE = """{ outputs = { self }: { nixosConfigurations.web = import ./system.nix { name = "web"; app = ./app; other = ./app; revision = "fleet"; }; }; }"""
web.succeed("mkdir -p /tmp/release/app", f"echo {shlex.quote(FLAKE)} > /tmp/release/flake.nix", "cp -r /etc/scenario/system.nix /etc/scenario/switch-to-configuration /etc/scenario/systems /tmp/release")

web.succeed("cd /tmp/release/app; echo 0 > content; echo none > trouble; echo default > variant",
    f"nix-env --profile {PROFILE} --set $(nix build --no-link --print-out-paths path:/tmp/release#nixosConfigurations.web.config.system.build.toplevel); {PROFILE}/bin/switch-to-configuration switch")

def publish_release(sequence, content="1", trouble="none", key="signer", change="."):
    web.succeed(f"cd /tmp/release/app; echo {content} > content; echo {trouble} > trouble; echo default > variant", "tar -C /tmp/release --sort=name --mtime=@0 -cf - . | gzip -n > /tmp/a.tar.gz")
    archive = web.succeed("base64 -w0 /tmp/a.tar.gz").strip()
    hub.succeed(f"base64 -d > /tmp/a.tar.gz <<< {archive}")
    sha = hub.succeed("sha256sum /tmp/a.tar.gz | cut -c1-64").strip()
    size = int(hub.succeed("stat -c %s /tmp/a.tar.gz"))
    manifest = {"format": 1, "host": "web", "id": sha, "sequence": sequence, "sha256": sha, "size": size, "attr": "web", "published": 1700000000 + sequence}
    text = json.dumps(manifest)
    hub.succeed(f"cp /tmp/a.tar.gz {SERVED}/release/{sha}.tar.gz", f"printf %s {shlex.quote(text)} > /tmp/m", f"rm -f /tmp/m.sig; ssh-keygen -q -Y sign -n ekiben -f /root/{key} /tmp/m")
    signature = hub.succeed("cat /tmp/m.sig")
    hub.succeed(f"printf %s {shlex.quote(json.dumps({'manifest': text, 'signature': signature}))} > {SERVED}/release/manifest.json")
    return sha

def heartbeat():
    return json.loads(hub.succeed(f"cat {SERVED}/reports/heartbeat.json"))

with subtest("deploy"):
    sha = publish_release(1)
    ended = run(web, "fleet")
    print(json.dumps(ended, indent=1))
    assert ended["result"] == "deployed", ended
    print(json.dumps(heartbeat(), indent=1))
    print(hub.succeed(f"ls -l {SERVED}/reports; zcat {SERVED}/reports/*.gz"))
