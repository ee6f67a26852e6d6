start_all()
server.wait_for_unit("multi-user.target")
# what the runs do is no matter here
server.succeed("systemctl stop ekiben-app.path")
TOKEN = "-H 'Authorization: Bearer token-app-0123456789'"


def status_of(machine, arguments):
    return machine.succeed(f"curl -s -o /tmp/answer -w '%{{http_code}}' {arguments}").strip()


with subtest("the webhook listens on a Unix socket, for whoever has a token, and on nothing else"):
    socket = "--unix-socket /run/ekiben.sock http://x/ekiben"
    assert status_of(server, f"-X POST {TOKEN} {socket}") == "202"
    assert status_of(server, f"-X POST {socket}") == "401"
    assert server.succeed(as_deploy(f"curl -s -o /tmp/answer-deploy -w '%{{http_code}}' -X POST {TOKEN} {socket}")).strip() == "202"
    server.fail("nc -z localhost 8787")

if is_host(server):
    print("nginx is shown on a virtual machine: here, only Ekiben's own part of the module is installed")
else:
    with subtest("nginx passes its path on, and no other"):
        server.wait_for_open_port(80)
        for _ in range(3):
            assert status_of(client, f"-X POST {TOKEN} http://server/ekiben") == "202"
        assert status_of(client, f"{TOKEN} http://server/ekiben") == "200"
        assert status_of(client, "-X POST http://server/ekiben") == "401"
        assert status_of(client, f"-X POST {TOKEN} http://server/other") == "404"
        assert status_of(client, f"-X POST {TOKEN} -H 'Transfer-Encoding: chunked' -d x http://server/ekiben") == "202"
        server.succeed("journalctl -o cat -u ekiben-webhook | grep -F 'Request '")
