"""Measures the listener on this host, one request at a time; prints milliseconds, one a line.

usage: measure.py answers COUNT | answers-when-queued COUNT | first-lines COUNT | starts COUNT UNIT
"""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

POST = b"POST /ekiben HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-app-0123456789\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
REQUEST = Path("/var/lib/ekiben/queue/app")


def post():
    """One accepted request; returns how long the answer took, with the connection."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", 8787), 5) as connection:
        connection.sendall(POST)
        status = connection.recv(4096)[9:12]
        took = time.perf_counter() - began
    assert status == b"202", status
    return took


def answers(count):
    """Each request is the first since a run took the one before."""
    for _ in range(count):
        REQUEST.unlink(missing_ok=True)
        yield post()
        # some answer before they have done it
        while not REQUEST.exists():
            time.sleep(0.0001)


def answers_when_queued(count):
    """Each request comes when there is one already."""
    post()
    for _ in range(count):
        yield post()


def first_lines(count):
    """From the request to what the first process of the run says."""
    command = ["journalctl", "--follow", "--output=json", f"--since=@{time.time()}", "--unit=ekiben-app"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as journal:
        for _ in range(count):
            asked = time.time()
            post()
            first = None
            for line in map(json.loads, journal.stdout):
                if line.get("_SYSTEMD_UNIT") == "ekiben-app.service":
                    first = first or int(line["__REALTIME_TIMESTAMP"]) / 1e6
                elif line.get("JOB_RESULT") == "done":
                    break
            yield first - asked
        journal.kill()


def starts(count, unit):
    """From the start of a unit to its first answer."""
    for _ in range(count):
        subprocess.run(["systemctl", "stop", unit], check=True)
        began = time.perf_counter()
        subprocess.run(["systemctl", "start", "--no-block", unit], check=True)
        while True:
            try:
                post()
                break
            except ConnectionError:
                time.sleep(0.0005)
        yield time.perf_counter() - began


what, count, *rest = sys.argv[1:]
for seconds in globals()[what.replace("-", "_")](int(count), *rest):
    print(f"{seconds * 1000:.3f}", flush=True)
