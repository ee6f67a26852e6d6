"""The webhook's job on Python's threading HTTP server: checks the token, asks for the run."""

import hmac
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

AUTHORIZATION = b"Bearer " + Path("/etc/scenario/token-app").read_bytes().strip()
REQUEST = Path("/var/lib/ekiben/queue/app")


class Hook(BaseHTTPRequestHandler):
    """Answers POST /ekiben."""

    def do_POST(self):
        """Asks for a run, if the token is right."""
        if self.path != "/ekiben":
            self.answer(404)
        elif not hmac.compare_digest(self.headers.get("Authorization", "").encode(), AUTHORIZATION):
            self.answer(401)
        else:
            REQUEST.touch()
            self.answer(202)

    def answer(self, status):
        """An answer without a body."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


ThreadingHTTPServer(("0.0.0.0", 8787), Hook).serve_forever()
