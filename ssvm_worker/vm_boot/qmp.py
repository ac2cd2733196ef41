"""Talk QMP, QEMU's machine protocol: one JSON object per line, over an inherited socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

#: Seconds between two calls of the check while QEMU is silent.
_TICK_S = 0.5
#: Seconds for one answer. A screendump takes less than a second, or some seconds on a busy machine.
_TIMEOUT_S = 60.0


class MonitorError(Exception):
    """QEMU has ended, does not answer, or refuses a command."""


class Monitor:
    """Connection to one running QEMU. *check* is called in every wait, and may raise."""

    def __init__(self, sock: socket.socket, check: Callable[[], None]) -> None:
        #: Names of all events, in order: SHUTDOWN, RESET, GUEST_PANICKED, …
        self.events: list[str] = []
        self._sock = sock
        self._check = check
        self._held = b""
        sock.settimeout(_TICK_S)
        self._line()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its result. Raises MonitorError."""
        try:
            self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise MonitorError("QEMU has ended") from error
        while True:
            message = self._line()
            if "event" in message:
                self.events.append(message["event"])
            elif "error" in message:
                raise MonitorError(f"{command}: {message['error']['desc']}")
            else:
                return message.get("return")

    def _line(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\n" not in self._held:
            self._check()
            try:
                received = self._sock.recv(65536)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise MonitorError("QEMU does not answer") from None
                continue
            except OSError as error:
                raise MonitorError("QEMU has ended") from error
            if not received:
                raise MonitorError("QEMU has ended")
            self._held += received
        line, _, self._held = self._held.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
