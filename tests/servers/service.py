"""``ssvm serve`` in a thread of the test, with a broker, a directory store named ``primary`` and a key for links."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.serve.server import make_server, open_listener, run_server
from ssvm_worker.wiring import assembly
from tests.servers.broker import Broker
from tests.waiting import CLAIM_S, PATIENCE_S

SECRET = "not a secret at all, but 32 long"


@dataclass
class Service:
    """A running service."""

    settings: Settings
    url: str
    store: Path

    def request(self, method: str, path: str, **given: Any) -> urllib3.BaseHTTPResponse:
        """Send a request on a new connection."""
        url = path if path.startswith("http") else self.url + path
        pool = {"ssl_context": given.pop("ssl_context")} if "ssl_context" in given else {}
        return urllib3.PoolManager(retries=False, timeout=PATIENCE_S, **pool).request(method, url, **given)


def settings_of(broker: Broker, store: Path, **serve: Any) -> Settings:
    """Return settings of a service. *serve* is added to its section."""
    store.mkdir(exist_ok=True)
    section = {"keys": {"k1": {"secret": SECRET}}, "key": "k1", "listen": "127.0.0.1:0"} | serve
    values = {
        "state_dir": str(store.parent / "state"),
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "ledger": {"claim_s": 2 * CLAIM_S},
        "stores": {"primary": {"url": f"file://{store}"}},
        "serve": section,
    }
    return parse(values, "the test")


def settings_file(service: Service, directory: Path) -> Path:
    """Return the settings of the service, for a command."""
    broker, serve = service.settings.broker, service.settings.serve
    file = directory / "worker.toml"
    file.write_text(
        f'[broker]\nurl = "{broker.url.get_secret_value()}"\nprefix = "{broker.prefix}"\n'
        f'[stores.primary]\nurl = "file://{service.store}"\n'
        f'[serve]\nurl = "{serve.url}"\nkey = "k1"\n[serve.keys.k1]\nsecret = "{SECRET}"\n'
    )
    return file


@contextmanager
def serving(settings: Settings, path: str = "") -> Iterator[Service]:
    """Run the service while the block runs. At the end it stops as after SIGTERM. *path* is that of ``serve.url``."""
    listener = open_listener(settings.serve)
    serve = settings.serve
    scheme = "https" if serve.certificate_file or serve.certificate_from_cloudstack else "http"
    url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    settings = settings.model_copy(update={"serve": settings.serve.model_copy(update={"url": url + path})})
    server = make_server(settings, listener)
    threading.Thread(target=lambda: asyncio.run(run_server(server, listener)), daemon=True).start()
    try:
        path = assembly.Stores(settings)["primary"].url.removeprefix("file://")
        yield Service(settings, url, Path(path))
    finally:
        server.should_exit = True  # The stop takes a moment. The next test need not wait for it.


@pytest.fixture
def start_service(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Return a function that starts a service with these settings."""
    with ExitStack() as stack:
        yield lambda **given: stack.enter_context(serving(settings_of(broker, tmp_path / "store", **given)))


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    """Return a service with the default settings."""
    return start_service()
