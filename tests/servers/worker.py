"""Real workers, started as ``ssvm worker`` starts them, with a broker, a store, and functions that disturb them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import read_draft
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ObjectNotFound
from ssvm_worker.jobs import find_job
from ssvm_worker.jobs.download.image import durable_bytes
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Record, queue_name
from ssvm_worker.runner.worker_command import worker_command
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.wiring.assembly import new_job, open_ledger
from ssvm_worker.wiring.celery_sender import send_wakeup
from tests.servers.broker import Broker, StoppableBroker
from tests.waiting import CLAIM_S, PATIENCE_S, until

ROOT = Path(__file__).resolve().parents[2]


class WorkerProcess:
    """One worker: the main process, its pool, and its log."""

    def __init__(self, settings: Settings, file: Path, log: Path, more: Mapping[str, str] | None = None) -> None:
        argv, environ = worker_command(settings)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                argv,
                env={**clean, **environ, **(more or {}), "SSVM_CONFIG": str(file)},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Return the main process."""
        return self.process.pid

    def children(self) -> list[int]:
        """Return the pool's processes."""
        return [int(each) for each in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def wait_ready(self) -> WorkerProcess:
        """Wait until the worker accepts messages."""
        until(lambda: b" ready." in self.log.read_bytes() or self.process.poll() is not None, "the worker is ready")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def signal_all(self, number: int) -> None:
        """Send a signal to the main process and to its pool."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kill the whole process tree with SIGKILL, like a power failure."""
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> int:
        """Send SIGTERM to the main process, and return its exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


@dataclass
class Site:
    """A broker, a directory store named ``primary``, and any number of workers. The times are short for tests."""

    broker: Broker
    directory: Path
    changes: dict[str, Any] = field(default_factory=dict)
    workers: list[WorkerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store.mkdir()
        values: dict[str, Any] = {
            "zone": "z",
            "state_dir": str(self.directory / "state"),
            "broker": {"url": self.broker.url, "prefix": self.broker.prefix},
            "worker": {"concurrency": 1, "drain_s": 0.2},
            "ledger": {"claim_s": CLAIM_S, "reap_s": 0.5},
            "retry": {"first_delay_s": 0.2, "max_delay_s": 0.5, "max_attempts": 4},
            "stores": {"primary": {"url": f"file://{self.store}"}},
            # On a busy machine, a second connection to a stalled source would get the source's next behaviour. A
            # stalled source must also outlast the preparations of a test.
            "download": {"allow_networks": ["127.0.0.0/8"], "resumes": 0, "connections": 1, "stall_s": PATIENCE_S},
            "callback": {"allow_networks": ["127.0.0.0/8"]},
        }
        for section, given in self.changes.items():
            values[section] = (values.get(section, {}) | given) if isinstance(given, dict) else given
        self.file.write_text("\n".join(_toml(values)))
        self.settings = parse(values, "the test")
        self.ledger: Ledger = open_ledger(self.settings)

    @property
    def store(self) -> Path:
        """Return the directory of the store."""
        return self.directory / "store"

    @property
    def file(self) -> Path:
        """Return the settings file."""
        return self.directory / "worker.toml"

    def start(self) -> WorkerProcess:
        """Start another worker, and wait until it is ready."""
        worker = WorkerProcess(self.settings, self.file, self.directory / f"worker{len(self.workers)}.log")
        self.workers.append(worker)
        return worker.wait_ready()

    def submit(self, job: str, **request: Any) -> str:
        """Submit a job as ``ssvm submit`` does, and return its id."""
        record, _ = self.ledger.submit(new_job(self.settings, find_job(job), request))
        send_wakeup(self.settings, record)
        return record.job_id

    def send(self, task: str, request: object, task_id: str = "", **given: Any) -> None:
        """Push a message with one argument."""
        self.send_args(task, [request], task_id, **given)

    def send_args(
        self, task: str, args: list[object], task_id: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Push a message as a server without Celery does: protocol 2, JSON."""
        lane = find_job(task).lane if task not in ("retry", "cancel") else "maintenance"
        task_id = task_id or uuid.uuid4().hex
        body = json.dumps([args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
        message = {
            "body": base64.b64encode(body.encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"lang": "go", "task": f"ssvm.{task}", "id": task_id, "root_id": task_id, "parent_id": None}
            | dict(headers or {}),
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_tag": uuid.uuid4().hex,
                "delivery_info": {"exchange": "", "routing_key": queue_name("z", lane)},
                "body_encoding": "base64",
            },
        }
        self.push(lane, json.dumps(message))

    def push(self, lane: str, text: str | bytes) -> None:
        """Put exactly these bytes into the queue of a lane."""
        with self.broker.client() as client:
            client.lpush(self._list(lane), text)

    def waiting(self, lane: str) -> int:
        """Return the messages that no worker has taken yet."""
        with self.broker.client() as client:
            return int(client.llen(self._list(lane)))

    def _list(self, lane: str) -> str:
        return self.broker.prefix + queue_name("z", lane)

    def wait(self, job_id: str, *states: str) -> Record:
        """Return the record when the job is in one of these states. Without states, wait for a final one."""
        self.until(lambda: self._is(job_id, states), f"job {job_id} is {' or '.join(states) or 'at its end'}")
        return self.ledger.get(job_id)

    def _is(self, job_id: str, states: tuple[str, ...]) -> bool:
        try:
            record = self.ledger.get(job_id)
        except ObjectNotFound:  # No worker has taken its message yet.
            return False
        return record.state in states if states else record.ended

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait until the condition is true."""
        until(true, what)

    def files(self) -> list[str]:
        """Return the store's files by their paths below it."""
        return sorted(os.path.relpath(each, self.store) for each in self._paths())

    def stored_bytes(self) -> int:
        """Return the bytes of all files of the store, with incomplete files."""
        total = 0
        for each in self._paths():
            with suppress(FileNotFoundError):
                total += os.path.getsize(each)
        return total

    def durable_bytes(self) -> int:
        """Return the byte from which another attempt at the template t1 of account 1 would continue."""
        draft = read_draft(FileStore("primary", self.store), Artifact("template", "1", "t1"))
        return durable_bytes(draft) if draft else 0

    def _paths(self) -> Iterator[str]:
        # walk ignores a directory that a worker removes at the same time.
        return (os.path.join(top, name) for top, _, names in os.walk(self.store) for name in names)

    def close(self) -> None:
        """End every worker, and print its log. pytest shows it if a test fails."""
        for worker in self.workers:
            worker.signal_all(signal.SIGCONT)
            worker.kill()
            print(f"--- {worker.log.name}\n{worker.log.read_text(errors='replace')}")
        self.ledger.close()


def _toml(values: dict[str, Any], path: str = "") -> Iterator[str]:
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    if path:
        yield f"[{path}]"
    for name, value in values.items():
        if name not in tables:
            yield f"{json.dumps(name)} = {json.dumps(value)}"  # JSON values here are valid TOML too.
    for name, value in tables.items():
        yield from _toml(value, f"{path}.{name}" if path else name)


@pytest.fixture
def make_site(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Return a function that makes sites. Each keyword is a section of the settings, or ``broker``."""
    made: list[Site] = []

    def make(on: Broker = broker, **changes: Any) -> Site:
        directory = tmp_path / f"site{len(made)}"
        directory.mkdir()
        made.append(Site(on, directory, changes))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    """Return a site with the settings of most tests, and no worker."""
    return make_site()


@pytest.fixture(scope="session")
def _shared_site(session_broker: StoppableBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(session_broker.with_prefix("shared:"), tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.close()


@pytest.fixture
def worker_site(_shared_site: Site) -> Site:
    """Return a site with one worker that many tests share. They must not disturb it, and choose their own ids."""
    return _shared_site
