# An input that cannot be fetched is a failure, whatever has been fetched of it before; and names of inputs
# that are none, or another's.
let
  inherit (import ./deployment.nix) instance;
  hasty = instance // {
    networkRetries = 0;
  };
in
{
  onlyHosts = true;
  nodes.server = {
    services.openssh.enable = true;
    environment.etc."scenario/forge.py".text = ''
      # A forge: serves the repositories below /srv by git's own HTTP (/git/NAME), tarballs of them as files that have an
      # ETag (/files/NAME.tar.gz) and, as far as Nix needs it, as GitHub does. What /srv/answer says is the status of
      # every answer.
      import hashlib
      import http.server
      import json
      import os
      import ssl
      import subprocess
      import sys
      import threading


      def git(name, *arguments):
          return subprocess.run(["git", "-C", f"/srv/{name}", *arguments], check=True, capture_output=True).stdout


      class Handler(http.server.BaseHTTPRequestHandler):
          def answer(self, body, kind="application/octet-stream"):
              tag = f'"{hashlib.sha256(body).hexdigest()}"'
              same = self.headers.get("If-None-Match") == tag
              self.send_response(304 if same else 200)
              self.send_header("Content-Type", kind)
              self.send_header("ETag", tag)
              self.send_header("Content-Length", "0" if same else str(len(body)))
              self.end_headers()
              if not same:
                  self.wfile.write(body)

          def backend(self, path, query):
              environment = os.environ | {
                  "GIT_PROJECT_ROOT": "/srv",
                  "GIT_HTTP_EXPORT_ALL": "1",
                  "PATH_INFO": path,
                  "QUERY_STRING": query,
                  "REQUEST_METHOD": self.command,
                  "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                  "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                  "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
              }
              said = self.rfile.read(int(self.headers.get("Content-Length", 0)))
              head, body = subprocess.run(["git", "http-backend"], env=environment, input=said, capture_output=True).stdout.split(b"\r\n\r\n", 1)
              headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
              self.send_response(int(headers.pop("Status", "200").split()[0]))
              for header in headers.items():
                  self.send_header(*header)
              self.send_header("Content-Length", str(len(body)))
              self.end_headers()
              self.wfile.write(body)

          def do_GET(self):
              if os.path.exists("/srv/answer"):
                  return self.send_error(int(open("/srv/answer").read()))
              path, _, query = self.path.partition("?")
              words = path.strip("/").split("/")
              if words[0] == "git":
                  self.backend(path.removeprefix("/git"), query)
              elif words[0] == "files":
                  name = words[1].removesuffix(".tar.gz")
                  self.answer(git(name, "archive", "--format=tar.gz", f"--prefix={name}/", "HEAD"))
              elif words[0] == "repos":
                  sha, tree = git(words[2], "rev-parse", "HEAD", "HEAD^{tree}").decode().split()
                  self.answer(json.dumps({"sha": sha, "commit": {"tree": {"sha": tree}}}).encode(), "application/json")
              else:
                  self.answer(git(words[1], "archive", "--format=tar.gz", f"--prefix={words[1]}/", words[3].removesuffix(".tar.gz")))

          do_POST = do_GET


      plain = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
      if len(sys.argv) > 1:
          secure = http.server.ThreadingHTTPServer(("127.0.0.1", 443), Handler)
          context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
          context.load_cert_chain(*sys.argv[1:])
          secure.socket = context.wrap_socket(secure.socket, server_side=True)
          threading.Thread(target=secure.serve_forever, daemon=True).start()
      plain.serve_forever()
    '';
    services.ekiben = {
      enable = true;
      instances = {
        app = hasty;
        patient = instance // {
          networkRetries = 2;
        };
        everything = hasty // {
          inputs = [ ];
        };
        typo = hasty // {
          inputs = [ "ap" ];
        };
        alias = hasty // {
          inputs = [ "alias" ];
        };
        nested = hasty // {
          inputs = [ "app/lib" ];
        };
        below = hasty // {
          flakeRef = "/var/nixos-config?dir=hosts#server";
        };
      };
    };
  };
}
