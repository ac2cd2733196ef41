"""A small HTTP server on loopback that serves one directory with ranges and ETags, as a mirror of templates does."""

from __future__ import annotations

import http.server
import shutil
import threading
from http import HTTPStatus
from pathlib import Path
from typing import IO


class _Handler(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of plain files, ``Range: bytes=N-`` included."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        path = self.root / Path(self.path.partition("?")[0]).name
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as file:
            self._send(file, path.stat().st_size, f'"{path.stat().st_mtime_ns:x}"')

    do_HEAD = do_GET

    def _send(self, file: IO[bytes], size: int, etag: str) -> None:
        start = self._start(size, etag)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        self.send_header("Content-Length", str(size - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            file.seek(start)
            shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _start(self, size: int, etag: str) -> int:
        wanted = self.headers.get("Range", "")
        if not (wanted.startswith("bytes=") and wanted.endswith("-") and wanted[6:-1].isdigit()):
            return 0
        return int(wanted[6:-1]) if self.headers.get("If-Range") in (None, etag) and int(wanted[6:-1]) < size else 0

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the demo's output is the worker's."""


class Web:
    """Serves *root* on a free port of loopback; a context manager."""

    def __init__(self, root: Path) -> None:
        handler = type("Handler", (_Handler,), {"root": root})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Web:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
