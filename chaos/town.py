"""A zone that can be hurt: workers, a broker, two stores, a vCenter and a publisher, all real, all on loopback."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ssvm_worker.demo.s3 import S3Server
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.stores import open_store
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Store
from tests.servers.broker import StoppableBroker
from tests.servers.clock import Clock
from tests.servers.disk import SmallDisk, may_mount
from tests.servers.http import HttpServer
from tests.servers.wire import Wire
from tests.servers.worker import Site, WorkerProcess

MiB = 1 << 20
#: Seconds of the settings that make all of it fast; a frozen worker is frozen for longer than its claim.
CLAIM_S = 2.5
ATTEMPTS = 5
_DISK_BYTES = 256 * MiB
#: Seconds until something must have come true, on a machine however busy.
_PATIENCE_S = 180.0


class Town:
    """A context manager. Whoever hurts a part heals it; nothing here heals itself but by a worker that is started."""

    def __init__(self, workers: int = 2) -> None:
        self._wanted = workers
        self._stack = ExitStack()
        # A short path: below it lies a unix socket.
        self.scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.worker_clock = Clock(self.scratch, "workers")
        self.broker_clock = Clock(self.scratch, "broker")
        self.disk: SmallDisk | None = None

    def __enter__(self) -> Town:
        with self._stack as stack:
            self.broker = StoppableBroker(self.scratch, self.broker_clock.environ)
            self.broker.start()
            stack.callback(self._stop_broker)
            self.s3 = stack.enter_context(S3Server())
            self.vcenter = stack.enter_context(VCenterSimulator())
            self.publisher = HttpServer()
            stack.callback(self.publisher.close)
            self.wires = {
                # Slow enough that faults find transfers.
                "S3": Wire(self.s3.port, rate=4 * MiB),
                "the vCenter": Wire(self.vcenter.port),
                "the publisher": Wire(self.publisher.port),
            }
            for wire in self.wires.values():
                stack.callback(wire.close)
            self._make_site(stack)
            self.vcenter_well()
            self.muster()
            self.ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _make_site(self, stack: ExitStack) -> None:
        self.bucket, self.out = self.s3.make_bucket("archive"), self.s3.make_bucket("out")
        # It keeps every version, and so tells afterwards who has written what.
        versions = {"Status": "Enabled"}
        self.s3.client().put_bucket_versioning(Bucket=self.bucket, VersioningConfiguration=versions)
        directory = self.scratch / "site"
        directory.mkdir()
        self.site = Site(self.broker.with_prefix("ssvm:"), directory, self._settings())
        stack.callback(self._end_workers)
        if may_mount():
            self.disk = SmallDisk(self.site.store, _DISK_BYTES)
            stack.callback(self.disk.close)
        self.stores: dict[str, Store] = {
            "primary": FileStore("primary", self.site.store),
            "archive": open_store("archive", f"s3://{self.bucket}", **self._keys(self.s3.endpoint)),
        }

    def _settings(self) -> dict[str, Any]:
        keys = self._keys(f"http://127.0.0.1:{self.wires['S3'].port}")
        login = {"username": self.vcenter.username, "password": self.vcenter.password}
        place = {"host": "127.0.0.1", "port": self.wires["the vCenter"].port, "ca_file": str(self.vcenter.ca_file)}
        return {
            "worker": {"concurrency": 2, "drain_s": 0.5},
            "ledger": {"claim_s": CLAIM_S, "reap_s": 0.5},
            "retry": {"first_delay_s": 0.3, "max_delay_s": 1.0, "max_attempts": ATTEMPTS},
            "stores": {"archive": {"url": f"s3://{self.bucket}"} | keys},
            "credentials": {"lab": keys},
            "vcenters": {"vc": login | place},
            "backup": {"lease_delay_s": 0.2},
            "quota": {"default": "10GiB"},
        }

    def _keys(self, endpoint: str) -> dict[str, str]:
        return {"endpoint": endpoint, "access_key": self.s3.access_key, "secret_key": self.s3.secret_key}

    # Workers

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that run, or are frozen."""
        return [each for each in self.site.workers if each.process.poll() is None]

    def muster(self) -> None:
        """Start as many workers as are missing, as their supervisor does; they are ready in a moment."""
        for _ in range(self._wanted - len(self.workers)):
            log = self.site.directory / f"worker{len(self.site.workers)}.log"
            environ = self.worker_clock.environ
            self.site.workers.append(WorkerProcess(self.site.settings, self.site.file, log, environ))

    def ready(self) -> None:
        """Wait until all that run take messages."""
        for each in self.workers:
            with suppress(AssertionError):  # it has ended instead
                each.wait_ready()

    def _end_workers(self) -> None:
        for each in self.site.workers:
            each.signal_all(signal.SIGCONT)
            each.kill()
        self.site.ledger.close()

    # Neighbours

    def url(self, path: str) -> str:
        """The URL of a path of the publisher, by its wire."""
        return f"http://127.0.0.1:{self.wires['the publisher'].port}/{path}"

    def vcenter_well(self, **faults: Any) -> None:
        """Nothing is wrong with the vCenter but these faults; what a dead worker leases, it has for a moment only."""
        self.vcenter.fault(lease_timeout=4, host=f"127.0.0.1:{self.wires['the vCenter'].port}", **faults)

    def running(self) -> int:
        """How many jobs run, by the ledger."""
        return self.site.ledger.counts()["running"]

    def _stop_broker(self) -> None:
        if self.broker.running:
            self.broker.stop()

    def remove(self) -> None:
        """Remove what the run has left on this machine, its logs too."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def until(true: Callable[[], bool], what: str, patience_s: float = _PATIENCE_S) -> None:
    """Wait until something is true; AssertionError when it does not become so."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.05)
