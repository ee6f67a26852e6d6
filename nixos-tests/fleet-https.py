# ruff: noqa: F821
start_all()
HUB = "/var/lib/ekiben-hub"
RELEASE = f"{HUB}/hosts/web/release"
OWN = "/var/lib/ekiben/instances/fleet"
# what the manual says, but for the certificate
SITE = r"""
server {
  listen 443 ssl;
  server_name hub;
  ssl_certificate /etc/nginx/certificate;
  ssl_certificate_key /etc/nginx/key;
  access_log /var/log/nginx/access.log combined;
  root /var/lib/ekiben-hub;
  auth_basic hosts;
  auth_basic_user_file /etc/nginx/passwords;
  include /etc/nginx/odd.conf;
  location / { return 404; }
  location ~ "^/hosts/(?<name>[^/]+)/release/manifest\.json$" {
    if ($remote_user != $name) { return 403; }
    add_header Cache-Control "max-age=60";
  }
  location ~ "^/hosts/(?<name>[^/]+)/release/[0-9a-f]{64}\.tar\.gz$" {
    if ($remote_user != $name) { return 403; }
    add_header Cache-Control "max-age=31536000, immutable";
  }
  location ~ "^/hosts/(?<name>[^/]+)/reports/[0-9a-z.]+$" {
    if ($remote_user != $name) { return 403; }
    limit_except PUT { deny all; }
    dav_methods PUT;
    dav_access group:r;
    client_max_body_size 64m;
  }
}
"""
OF_MANIFEST = "location = /hosts/web/release/manifest.json"
REACH = "systemctl start ekiben-reach@scenario"


def serve(odd="", certificate="good"):
    """Has the web server do as the manual says, but for what is odd, in nginx's words."""
    hub.succeed(
        f"printf %s {shlex.quote(odd)} > /etc/nginx/odd.conf; cp /etc/nginx/{certificate}.certificate /etc/nginx/certificate",
        ": > /var/log/nginx/access.log; systemctl reset-failed nginx || true; nginx -qt && systemctl restart nginx",
    )


def asked(what):
    """How often the web server was asked for what is like this, since it serves so."""
    return int(hub.succeed(f"grep -cEe {shlex.quote(what)} /var/log/nginx/access.log || true"))


def certify(name, subject, more="-days 9", ca="ca"):
    hub.succeed(
        f"cd /etc/nginx; openssl req -newkey rsa:2048 -nodes -keyout key.new -subj /CN={subject} 2> /dev/null > request; test -e key || mv key.new key",
        f"cd /etc/nginx; openssl req -new -key key -subj /CN={subject} > request; echo subjectAltName=DNS:{subject} > names",
        f"cd /etc/nginx; openssl x509 -req -in request -CA {ca} -CAkey {ca}.key -extfile names {more} 2> /dev/null > {name}.certificate",
    )


def fails(*words):
    """Checks that a poll fails, saying so, and that the host stays as it is."""
    before = running(web)
    ended = poll(web)
    assert ended["result"] == "failed" and ended["stage"] == "prepare" and all(word in ended["error"] for word in words), ended
    assert running(web) == before
    return ended["error"]


def follows(machine, content):
    ended = poll(machine)
    assert ended["result"] == "deployed" and shows(machine, "app") == content, ended
    becomes(hub, machine.name, "up to date")


with subtest("a fleet with a web server is set up"):
    found_fleet(hub, {web: "web", db: "db"})
    for name in ("web", "db"):
        write(hub, f"/srv/fleet/hosts/{name}/flake.nix", f"{{ outputs = {{ self }}: {{ nixosConfigurations.{name} = {system(name)}; }}; }}")
    hub.succeed("cd /etc/nginx; rm -f sites-enabled/*; for ca in ca other; "
                "do openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=$ca -keyout $ca.key 2> /dev/null > $ca; done")
    certify("good", "hub")
    certify("stranger", "hub", ca="other")
    certify("elsewhere", "elsewhere")
    certify("expired", "hub", more="-not_before 20200101000000Z -not_after 20210101000000Z")
    hub.succeed(f"printf %s {shlex.quote(SITE)} > /etc/nginx/sites-enabled/hub", "usermod -aG ekiben-hub,ekiben-publisher www-data")
    for machine in (web, db):
        hub.succeed(f"echo {machine.name}:$(openssl passwd -apr1 password-{machine.name}) >> /etc/nginx/passwords")
        machine.succeed(f"echo machine hub login {machine.name} password password-{machine.name} > /root/netrc; chmod 600 /root/netrc")
        machine.succeed(f"printf %s {shlex.quote(hub.succeed('cat /etc/nginx/ca'))} >> /etc/ssl/certs/ca-certificates.crt")
    serve()
    fails("the hub has none for web yet")

with subtest("a host without a way to the hub's sshd fetches, deploys and reports by HTTPS; one with it reports there"):
    hub.succeed(fleet("deploy"))
    follows(web, "1")
    follows(db, "2")
    assert "activating" in hub.succeed(fleet("log web last")) and asked("- db .*PUT") == 0
    assert web.succeed(f"ls {OWN}/*.tar.gz | wc -l").strip() <= "1"

with subtest("nothing new: one request without contents, and a heartbeat; a report is sent once"):
    reports = "- web .*PUT /hosts/web/reports/[0-9a-f]{32}.json"
    assert asked(reports) == 1, hub.succeed("cat /var/log/nginx/access.log")
    poll(web)
    serve()
    assert poll(web)["result"] == "unchanged"
    assert asked("GET .*manifest.json HTTP/.*\" 304 0") == 1 and asked("GET") == 1 and asked(reports) == 0, hub.succeed("cat /var/log/nginx/access.log")
    assert asked("PUT /hosts/web/reports/heartbeat.json") >= 1
    # what was kept of it is gone: it is fetched again
    web.succeed(f"rm {OWN}/manifest.json")
    assert poll(web)["result"] == "unchanged"

with subtest("a timer finds out by one request that nothing is new, and has a run begin if something is"):
    serve()
    assert look(web) == [] and asked("GET") == 1 and asked("PUT /hosts/web/reports/heartbeat.json") == 1
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    assert [run["result"] for run in look(web)] == ["deployed"] and shows(web, "app") == content
    becomes(hub, "web", "up to date")

with subtest("a host can do nothing there but what it may"):
    curl = "curl -s -o /tmp/answer -w '%{http_code}' --netrc-file /root/netrc https://hub/hosts"
    archive = json.loads(json.loads(hub.succeed(f"cat {HUB}/hosts/db/release/manifest.json"))["manifest"])["id"]
    for expected, arguments in (
        ("200", "/web/release/manifest.json"), ("403", "/db/release/manifest.json"), ("403", f"/db/release/{archive}.tar.gz"),
        ("404", "/web/release/received.json"), ("404", "/web/files/index.json"), ("404", "/known.json"), ("403", "/web/reports/heartbeat.json"),
        ("403", "/db/reports/heartbeat.json -T /etc/hostname"), ("404", "/web/release/x -T /etc/hostname"),
        ("405", "/web/release/manifest.json -T /etc/hostname"),
        ("403", "/web/reports/heartbeat.json -X DELETE"), ("403", "/web/reports/../../db/reports/x -T /etc/hostname --path-as-is"),
    ):
        assert web.succeed(f"{curl}{arguments}").strip() == expected, arguments
    assert web.succeed("curl -s -o /tmp/answer -w '%{http_code}' https://hub/hosts/web/release/manifest.json").strip() == "403"
    assert web.succeed("curl -s -u web:wrong -o /tmp/answer -w '%{http_code}' https://hub/hosts/web/release/manifest.json").strip() == "401"

with subtest("of an archive that is cut off, the rest is fetched"):
    hub.succeed(as_deploy("head -c 400000 /dev/urandom > /srv/fleet/hosts/web/app/blob"))
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    serve('location ~ "^/hosts/web/release/.*gz$" { limit_rate_after 100k; limit_rate 1k; }')
    web.execute("systemctl start --no-block ekiben-fleet")
    web.wait_until_succeeds(f"test $(cat {OWN}/*.tar.gz | wc -c) -ge 50000")
    hub.succeed("systemctl kill --signal=KILL nginx; systemctl stop nginx")
    wait_until_idle(web, "fleet")
    wait_until_idle(web, "deliver")
    ended = last_run(web, "fleet")
    assert ended["result"] == "failed" and "problem of the network or the other side" in ended["error"], ended
    part = int(web.succeed(f"cat {OWN}/*.tar.gz | wc -c"))
    serve()
    follows(web, content)
    assert asked('gz HTTP/1.1" 206|gz HTTP/2.0" 206') == 1 and 50000 <= part < 400000

with subtest("a server without parts of files, or with other ones, is asked for all"):
    hub.succeed(as_deploy("head -c 400000 /dev/urandom > /srv/fleet/hosts/web/app/blob"))
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    archive = f"{json.loads(json.loads(hub.succeed(f'cat {RELEASE}/manifest.json'))['manifest'])['id']}.tar.gz"
    web.succeed(f"rm -f {OWN}/*.tar.gz; head -c 1000 {'/dev/zero'} > {OWN}/{archive}; chown --reference={OWN} {OWN}/{archive}")
    serve('location ~ "^/hosts/web/release/.*gz$" { return 500; }')
    fails("returned error: 500", "problem of the network or the other side")
    # that is no refusal of what is published
    web.succeed(f"test ! -e {OWN}/refused")
    serve('location ~ "^/hosts/web/release/.*gz$" { max_ranges 0; }')
    follows(web, content)
    hub.succeed(as_deploy("head -c 400000 /dev/urandom > /srv/fleet/hosts/web/app/blob"))
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    archive = f"{json.loads(json.loads(hub.succeed(f'cat {RELEASE}/manifest.json'))['manifest'])['id']}.tar.gz"
    web.succeed(f"rm -f {OWN}/*.tar.gz; head -c 1000 {'/dev/zero'} > {OWN}/{archive}; chown --reference={OWN} {OWN}/{archive}")
    serve()
    follows(web, content)

with subtest("whatever a server answers: the host says why, stays as it is, and goes on when that is over"):
    endless = "#!/bin/sh\nhead -n 1 > /dev/null\nprintf 'HTTP/1.0 200 OK\\r\\n\\r\\n'\nexec cat /dev/zero\n"
    hub.succeed(f"truncate -s 300000 /srv/huge; printf %s {shlex.quote(endless)} > /srv/endless; chmod 755 /srv/endless")
    hub.succeed("systemd-run socat TCP-LISTEN:8001,fork,reuseaddr EXEC:/srv/endless")
    other_side = "problem of the network or the other side"
    for odd, words in (
        ("return 404;", ("the hub has none for web yet",)),
        ("return 403;", ("Failed to fetch https://hub/hosts/web/release/manifest.json: The requested URL returned error: 403",)),
        ("return 500;", ("returned error: 500", other_side)),
        ("return 302 http://hub/;", ("Protocol \"http\"",)),
        ("return 302 file:///etc/passwd;", ("Protocol \"file\"",)),
        ("return 302 https://hub/hosts/web/release/manifest.json;", ("Maximum (5) redirects followed",)),
        ("return 204;", ("unexpected HTTP status 204",)),
        ("alias /srv/huge;", ("Maximum file size exceeded",)),
        ("proxy_pass http://127.0.0.1:8001; proxy_buffering off;", ("xceeded",)),
        ("return 200 '<html>';", ("expected value at line 1", "another server has answered")),
    ):
        serve(f"{OF_MANIFEST} {{ {odd} }}")
        said = fails(*words)
        assert (other_side in said) == (other_side in words), said
        # only that is nobody's release, and no doing of this host's
        assert (web.execute(REACH)[0] == 0) == (odd == "return 500;"), odd
    for certificate, words in (
        ("stranger", "unable to get local issuer certificate"), ("elsewhere", "no alternative certificate subject name matches"),
        ("expired", "certificate has expired"),
    ):
        serve(certificate=certificate)
        fails(words)
        web.fail(REACH)
    hub.succeed("systemctl stop nginx")
    fails(other_side)
    web.fail(REACH)
    serve()
    assert poll(web)["result"] == "unchanged"
    becomes(hub, "web", "up to date")

with subtest("a release by which the host would ask for another host's ones is not kept"):
    config, before = "/srv/fleet/hosts/web/web/systems/default/etc/ekiben/config.json", running(web)
    hub.succeed(as_deploy(f"cp {config} /tmp/kept; jq '.instances.fleet.hub.name = \"other\"' /tmp/kept > {config}"), fleet("deploy web"))
    ended = poll(web)
    assert ended["result"] == "rolledBack" and "health check hub" in ended["error"] and running(web) == before, ended
    assert "returned error: 403" in web.succeed("ekiben log fleet")
    hub.succeed(as_deploy(f"cp /tmp/kept {config}"))
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    follows(web, content)

with subtest("who has the server can make no release"):
    old = hub.succeed(f"cat {RELEASE}/manifest.json")
    content = change_hosts(hub, "web")
    hub.succeed(fleet("deploy web"))
    hub.succeed(f"cp -a {RELEASE} /srv/release", f"sed -i 's/web/bew/' {RELEASE}/manifest.json")
    fails("signed by none of `signers`")
    hub.succeed(f"cp -a /srv/release/manifest.json {RELEASE}; for file in {RELEASE}/*.tar.gz; "
                "do printf x | dd of=$file conv=notrunc bs=1 seek=99 2> /dev/null; done")
    fails("the archive does not match the manifest")
    hub.succeed(f"rm {RELEASE}/*.tar.gz")
    fails("the hub does not have its archive")
    hub.succeed(f"cp -a /srv/release/. {RELEASE}")
    follows(web, content)

with subtest("an older release is a cache's for an hour, and a replay from then on"):
    hub.succeed(f"printf %s {shlex.quote(old)} > {RELEASE}/manifest.json")
    follow(web, "fleet")
    assert poll(web)["result"] == "unchanged"
    wait_until_said(web, "fleet", "has been seen before")
    web.succeed(f"touch -d '2 hours ago' {OWN}/seen.json")
    fails("has been seen before", "replays a release")
    becomes(hub, "web", "refusing")
    hub.succeed(f"cp -a /srv/release/manifest.json {RELEASE}")
    assert poll(web)["result"] == "unchanged"
    becomes(hub, "web", "up to date")

with subtest("where the hub's sshd is down, releases come all the same, and reports later"):
    content = change_hosts(hub, "db")
    hub.succeed(fleet("deploy db"), "systemctl stop ssh.socket ssh sshd 2> /dev/null || true", "! nc -z localhost 22")
    assert poll(db)["result"] == "deployed" and shows(db, "app") == content
    hub.succeed("systemctl start sshd")
    poll(db)
    becomes(hub, "db", "up to date")
    assert "activating" in hub.succeed(fleet("log db last"))

with subtest("a server that drips holds nothing up for longer than fetching may take"):
    serve(f"{OF_MANIFEST} {{ limit_rate 20; }}")
    fails("timed out", other_side)
