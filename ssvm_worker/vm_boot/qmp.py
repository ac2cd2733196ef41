"""QMP, QEMU's machine protocol: a JSON object a line, over a socket that it has inherited."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

#: Seconds between two looks at the stop flag while QEMU is silent.
_TICK_S = 0.5
#: Seconds for one answer: a screendump takes a fraction of one, on a busy machine some.
_PATIENCE_S = 60.0


class MonitorError(Exception):
    """QEMU has ended, does not answer, or refuses a command."""


class Monitor:
    """Asks one running QEMU; *check* is called while it is waited for, and may raise."""

    def __init__(self, sock: socket.socket, check: Callable[[], None]) -> None:
        #: The names of what has happened, in order: SHUTDOWN, RESET, GUEST_PANICKED, …
        self.events: list[str] = []
        self._sock = sock
        self._check = check
        self._held = b""
        sock.settimeout(_TICK_S)
        self._line()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What a command returns; MonitorError."""
        try:
            self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise MonitorError("QEMU has ended") from error
        while True:
            said = self._line()
            if "event" in said:
                self.events.append(said["event"])
            elif "error" in said:
                raise MonitorError(f"{command}: {said['error']['desc']}")
            else:
                return said.get("return")

    def _line(self) -> dict[str, Any]:
        until = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._held:
            self._check()
            try:
                came = self._sock.recv(65536)
            except TimeoutError:
                if time.monotonic() > until:
                    raise MonitorError("QEMU does not answer") from None
                continue
            except OSError as error:
                raise MonitorError("QEMU has ended") from error
            if not came:
                raise MonitorError("QEMU has ended")
            self._held += came
        line, _, self._held = self._held.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found
