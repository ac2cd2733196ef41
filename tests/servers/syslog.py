"""A receiver of log lines, on a real socket."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

#: Facility daemon (3), and the program's name.
_LINE = re.compile(r"<(?P<priority>\d+)>ssvm: (?P<text>.*)", re.DOTALL)


class Syslog:
    """Receives datagrams until it is closed: at a path, or on a free UDP port of loopback."""

    def __init__(self, path: Path | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX if path else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(str(path) if path else ("127.0.0.1", 0))
        self.url = f"unix://{path}" if path else f"udp://127.0.0.1:{self._socket.getsockname()[1]}"
        #: Level of severity (3 error, 4 warning, 6 info) and text of each line.
        self.lines: list[tuple[int, str]] = []
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while data := self._socket.recv(65536):
            found = _LINE.fullmatch(data.decode())
            assert found, data
            facility, severity = divmod(int(found["priority"]), 8)
            assert facility == 3
            self.lines.append((severity, found["text"]))

    def close(self) -> None:
        """Stop the receiver."""
        with socket.socket(self._socket.family, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join(PATIENCE_S)
        self._socket.close()


@pytest.fixture
def syslog() -> Iterator[Syslog]:
    """Return a receiver on a UDP port."""
    found = Syslog()
    yield found
    found.close()
