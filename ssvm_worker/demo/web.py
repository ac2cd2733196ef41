"""A small HTTP server on loopback that serves one directory with ranges and ETags, like a mirror of templates."""

from __future__ import annotations

import contextlib
import http.server
import re
import shutil
import threading
from http import HTTPStatus
from pathlib import Path


class _Handler(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of regular files, also with ``Range: bytes=N-``."""

    protocol_version = "HTTP/1.1"
    root: Path
    starts: list[int]

    def do_GET(self) -> None:
        path = self.root / Path(self.path.partition("?")[0]).name
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as file:
            size, etag = path.stat().st_size, f'"{path.stat().st_mtime_ns:x}"'
            start = 0
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if match and int(match[1]) < size and self.headers.get("If-Range") in (None, etag):
                start = int(match[1])
            self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
            self.send_header("Content-Length", str(size - start))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", etag)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            if self.command == "GET":
                self.starts.append(start)
                file.seek(start)
                with contextlib.suppress(ConnectionError):  # a client may end its connection early
                    shutil.copyfileobj(file, self.wfile, 1 << 20)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, so that the demo prints only its own lines."""


class Web:
    """HTTP server of *root* on a free port of loopback. Use it as a context manager."""

    def __init__(self, root: Path) -> None:
        #: The first byte of each response, in the order of the requests.
        self.starts: list[int] = []
        handler = type("Handler", (_Handler,), {"root": root, "starts": self.starts})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Web:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
