"""Receive callbacks: ``python receive.py PORT SECRET_FILE``. Needs only Python.

Prints one line for each job that has ended. Refuses wrong signatures, old callbacks and replays.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: The greatest difference between the clocks of worker and receiver, in seconds.
TOLERANCE_S = 300
#: The greatest body that is read. A request of at most 256 KiB is part of the record.
MAX_BYTES = 8 << 20


class Deliveries:
    """Decides which callbacks are genuine and new. Thread-safe."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._seen: dict[str, float] = {}
        self._lock = threading.Lock()

    def refusal(self, timestamp: str, signature: str, body: bytes) -> int:
        """Return the status that refuses this callback, or 0 for a genuine and new one."""
        signed = timestamp.encode() + b"." + body
        expected = "sha256=" + hmac.new(self._secret, signed, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            return 401
        now = time.time()
        if abs(now - int(timestamp)) > TOLERANCE_S:
            return 401
        with self._lock:
            # A callback that is older than this is refused by its timestamp.
            self._seen = {each: at for each, at in self._seen.items() if now - at <= 2 * TOLERANCE_S}
            if signature in self._seen:
                return 409
            self._seen[signature] = now
        return 0


class Handler(BaseHTTPRequestHandler):
    """Answers POST."""

    deliveries: Deliveries
    timeout = 30

    def do_POST(self) -> None:
        """Answer 204 for an accepted callback. The worker sends a refused one again, with a new timestamp."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            self._answer(413)
            return
        body = self.rfile.read(int(length))
        timestamp = self.headers.get("X-SSVM-Timestamp", "")
        status = self.deliveries.refusal(timestamp, self.headers.get("X-SSVM-Signature-V2", ""), body)
        if not status:
            record = json.loads(body)
            # It may arrive twice: job_id and the number of the last attempt identify the end of a job.
            print(record["job_id"], record["state"], flush=True)
        self._answer(status or 204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""


def main() -> None:
    """Serve until the process ends."""
    port, secret_file = sys.argv[1:]
    Handler.deliveries = Deliveries(Path(secret_file).read_bytes().strip())
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
