"""The zone under test: workers, a broker, two stores, a vCenter and a publisher, all real and on loopback."""

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
#: Short times in the settings make the run fast. A frozen worker stays frozen for longer than its claim.
CLAIM_S = 2.5
ATTEMPTS = 5
_DISK_BYTES = 256 * MiB
#: Seconds until a condition must be true, even on a busy machine.
_TIMEOUT_S = 180.0


class ChaosZone:
    """The zone, as a context manager. A fault must repair the parts that it damages, except ended workers."""

    def __init__(self, workers: int = 2) -> None:
        self._wanted = workers
        self._stack = ExitStack()
        # A short path, because it contains a unix socket.
        self.scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.worker_clock = Clock(self.scratch, "workers")
        self.broker_clock = Clock(self.scratch, "broker")
        self.disk: SmallDisk | None = None

    def __enter__(self) -> ChaosZone:
        with self._stack as stack:
            self.broker = StoppableBroker(self.scratch, self.broker_clock.environ)
            self.broker.start()
            stack.callback(self._stop_broker)
            self.s3 = stack.enter_context(S3Server())
            self.vcenter = stack.enter_context(VCenterSimulator())
            self.publisher = HttpServer()
            stack.callback(self.publisher.close)
            self.proxies = {
                # Slow enough that faults hit transfers.
                "S3": Wire(self.s3.port, rate=4 * MiB),
                "the vCenter": Wire(self.vcenter.port),
                "the publisher": Wire(self.publisher.port),
            }
            for proxy in self.proxies.values():
                stack.callback(proxy.close)
            self._make_site(stack)
            self.set_vcenter_faults()
            self.start_missing_workers()
            self.wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _make_site(self, stack: ExitStack) -> None:
        self.bucket, self.out = self.s3.make_bucket("archive"), self.s3.make_bucket("out")
        # The bucket keeps every version, so that the checks can count the writes.
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
        keys = self._keys(f"http://127.0.0.1:{self.proxies['S3'].port}")
        login = {"username": self.vcenter.username, "password": self.vcenter.password}
        address = {"host": "127.0.0.1", "port": self.proxies["the vCenter"].port, "ca_file": str(self.vcenter.ca_file)}
        return {
            "worker": {"concurrency": 2, "drain_s": 0.5},
            "ledger": {"claim_s": CLAIM_S, "reap_s": 0.5},
            "retry": {"first_delay_s": 0.3, "max_delay_s": 1.0, "max_attempts": ATTEMPTS},
            "stores": {"archive": {"url": f"s3://{self.bucket}"} | keys},
            "credentials": {"lab": keys},
            "vcenters": {"vc": login | address},
            "backup": {"lease_delay_s": 0.2},
            "quota": {"default": "10GiB"},
        }

    def _keys(self, endpoint: str) -> dict[str, str]:
        return {"endpoint": endpoint, "access_key": self.s3.access_key, "secret_key": self.s3.secret_key}

    # Workers

    @property
    def workers(self) -> list[WorkerProcess]:
        """Return the workers that run or are frozen."""
        return [each for each in self.site.workers if each.process.poll() is None]

    def start_missing_workers(self) -> None:
        """Start the missing workers, as a supervisor does. Do not wait until they are ready."""
        for _ in range(self._wanted - len(self.workers)):
            log = self.site.directory / f"worker{len(self.site.workers)}.log"
            environ = self.worker_clock.environ
            self.site.workers.append(WorkerProcess(self.site.settings, self.site.file, log, environ))

    def wait_ready(self) -> None:
        """Wait until all running workers receive messages."""
        for each in self.workers:
            with suppress(AssertionError):  # the worker ended instead
                each.wait_ready()

    def _end_workers(self) -> None:
        for each in self.site.workers:
            each.signal_all(signal.SIGCONT)
            each.kill()
        self.site.ledger.close()

    # Neighbours

    def url(self, path: str) -> str:
        """Return the URL of a path of the publisher, through its proxy."""
        return f"http://127.0.0.1:{self.proxies['the publisher'].port}/{path}"

    def set_vcenter_faults(self, **faults: Any) -> None:
        """Give the vCenter exactly these faults. Leases of dead workers expire after 4 seconds."""
        self.vcenter.fault(lease_timeout=4, host=f"127.0.0.1:{self.proxies['the vCenter'].port}", **faults)

    def running(self) -> int:
        """Return the number of running jobs, by the ledger."""
        return self.site.ledger.counts()["running"]

    def _stop_broker(self) -> None:
        if self.broker.running:
            self.broker.stop()

    def remove(self) -> None:
        """Remove all files of the run, including the logs."""
        shutil.rmtree(self.scratch, ignore_errors=True)


def until(condition: Callable[[], bool], what: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Wait until a condition is true; raise AssertionError after *timeout_s* seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.05)
