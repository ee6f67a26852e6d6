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
