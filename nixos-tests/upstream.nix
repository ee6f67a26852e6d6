# Private inputs are fetched with what the user's home holds, and the repository follows and feeds
# its upstream.
let
  inherit (import ./deployment.nix) instance;
  inherit (import ./fleet-keys.nix) signer other;
in
{
  nodes.forge = {
    services.openssh.enable = true;
    networking.firewall.allowedTCPPorts = [ 8000 ];
    # serves /srv/files to user "deploy" with password "secret"
    environment.etc."scenario/files.py".text = ''
      import base64, functools, http.server
      WANTED = "Basic " + base64.b64encode(b"deploy:secret").decode()
      class Handler(http.server.SimpleHTTPRequestHandler):
          def do_GET(self):
              if self.headers.get("Authorization") == WANTED:
                  return super().do_GET()
              self.send_response(401)
              self.send_header("WWW-Authenticate", 'Basic realm="files"')
              self.send_header("Content-Length", "0")
              self.end_headers()
      http.server.ThreadingHTTPServer(("", 8000), functools.partial(Handler, directory="/srv/files")).serve_forever()
    '';
  };
  nodes.server = {
    environment.etc."scenario/signer".text = signer.private;
    environment.etc."scenario/other".text = other.private;
    services.ekiben = {
      enable = true;
      instances = {
        app = instance;
        follower = instance // {
          pull = true;
          push = true;
          author = "Robot <robot@example.org>";
        };
        signed = instance // {
          pull = true;
          signers = [
            "valid-before=\"20300101\" ${signer.public}"
            "valid-before=\"20200101\" ${other.public}"
          ];
        };
      };
    };
  };
}
