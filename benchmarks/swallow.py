"""Both ends of a transfer without a disk: an HTTP server that generates bytes, and an S3 server that discards them.

The S3 server supports only what one multipart upload needs. Run it as a separate program. The program prints its
port. It ends when its standard input ends.
"""

from __future__ import annotations

import http.server
import random
import sys
import threading
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

_BLOCK = random.Random(1).randbytes(1 << 20)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    #: Bytes of each discarded object, by path.
    sizes: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()
    buffer_size = 1 << 20

    def do_GET(self) -> None:
        """Send ``/made/SIZE``, an object of SIZE bytes, or an empty list of open uploads."""
        path = urlsplit(self.path).path
        if path.startswith("/made/"):
            self._generate(int(path.rpartition("/")[2]))
        elif path.count("/") == 1 or path.endswith("/"):
            self._answer(
                200, b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
            )
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def do_HEAD(self) -> None:
        """Answer for the bucket or for an object."""
        path = urlsplit(self.path).path
        size = 0 if path.count("/") == 1 else self.sizes.get(path)
        if size is None:
            self._answer(404, b"")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()

    def do_POST(self) -> None:
        """Begin or complete an upload."""
        self._discard()
        path = urlsplit(self.path).path
        if "uploads" in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
            self.sizes[path] = 0
            self._answer(200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        else:
            self._answer(200, b'<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>')

    def do_PUT(self) -> None:
        """Receive a part, or a small object."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.close_connection = False
        size, path = self._discard(), urlsplit(self.path).path
        with self.lock:
            self.sizes[path] = size + (self.sizes.get(path, 0) if "partNumber" in self.path else 0)
        self._answer(200, b"")

    def do_DELETE(self) -> None:
        """Accept the deletion."""
        self._answer(204, b"")

    def _generate(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        for start in range(0, size, len(_BLOCK)):
            self.wfile.write(_BLOCK[: size - start])

    def _discard(self) -> int:
        left = size = int(self.headers.get("Content-Length", 0))
        view = memoryview(bytearray(self.buffer_size))
        while left:
            left -= self.rfile.readinto(view[: min(left, self.buffer_size)])  # type: ignore[attr-defined]
        return size

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def main() -> None:
    """Serve until standard input ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
