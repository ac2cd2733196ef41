"""A TLS server with ranges that limits the rate of each connection. Run it as a separate program.

nginx's limit_rate is not suitable: it limits each request, and lets the first second of a request pass.
The program prints its port. It ends when its standard input ends.
"""

from __future__ import annotations

import http.server
import re
import ssl
import sys
import threading
import time
from pathlib import Path

_PIECE = 256 * 1024


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    data: memoryview
    rate: float

    def setup(self) -> None:
        """Start the clock of a connection."""
        super().setup()
        self._due = time.monotonic()

    def do_HEAD(self) -> None:
        """Answer with the headers only."""
        self._head()

    def do_GET(self) -> None:
        """Send the file or one range of it."""
        body = self._head()
        for start in range(0, len(body), _PIECE):
            piece = body[start : start + _PIECE]
            self._due = max(self._due, time.monotonic() - 0.05) + len(piece) / self.rate
            time.sleep(max(0.0, self._due - time.monotonic()))
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return

    def _head(self) -> memoryview:
        total = len(self.data)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or total - 1)) if match else (0, total - 1)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", '"limited"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        return self.data[first : last + 1]

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class _Server(http.server.ThreadingHTTPServer):
    context: ssl.SSLContext

    def finish_request(self, request: object, client_address: object) -> None:
        """Do the TLS handshake in the connection's own thread."""
        super().finish_request(self.context.wrap_socket(request, server_side=True), client_address)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect early."""


def main(file: str, certificate: str, key: str, rate: str) -> None:
    """Serve the file from memory until standard input ends."""
    _Handler.data = memoryview(Path(file).read_bytes())
    _Handler.rate = float(rate)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(certificate, key)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
