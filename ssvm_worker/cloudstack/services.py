"""What the commands of a management server use."""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.client import Client
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.cloudstack_web import CloudStackWeb
from ssvm_worker.ledger.links.redis import LinkBook
from ssvm_worker.ledger.record import Record
from ssvm_worker.ledger.server_names import ServerNames
from ssvm_worker.wiring.assembly import open_cloudstack_web, open_links
from ssvm_worker.wiring.server_names import server_names

from .image_stores import ImageStores

_log = logging.getLogger("ssvm.cloudstack")
#: A burst of commands has ended if none comes for so many seconds, or after so many seconds.
_PAUSE_S, _BURST_S = 0.02, 0.2


@dataclass(frozen=True)
class Services:
    """The parts of this program that a command may use. All of them are thread-safe."""

    settings: Settings
    #: Submits, reads, retries and cancels jobs.
    jobs: Client
    #: The image stores that commands name.
    stores: ImageStores
    #: The connections of downloads.
    names: ServerNames
    #: What the server has set for `ssvm serve`: keys, certificates, links, internal sites.
    web: CloudStackWeb
    #: The upload links of this program. Each browser upload has one.
    links: LinkBook
    #: The directory for files of the agent.
    state_dir: Path


class _Waker:
    """Sends the messages of queued jobs in a thread, so that no answer waits for them.

    A hundred commands may come at once. Their messages are sent after the answers, because Python runs one thread.
    """

    def __init__(self) -> None:
        self._records: queue.SimpleQueue[Record] = queue.SimpleQueue()

    def wake(self, record: Record) -> None:
        """Let the thread send the message of the job. If it fails or this process ends, the reaper sends it."""
        self._records.put(record)

    def start(self, send: Callable[[Record], object]) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, args=(send,), name="waker", daemon=True).start()

    def _run(self, send: Callable[[Record], object]) -> None:
        while True:
            for record in self._burst():
                try:
                    send(record)
                except Exception:  # noqa: BLE001 - the reaper sends it, and the thread must not end
                    _log.exception("the message of job %s was not sent", record.job_id)

    def _burst(self) -> list[Record]:
        """Return the next job, and those that follow it closely."""
        found = [self._records.get()]
        until = time.monotonic() + _BURST_S
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < until:
                found.append(self._records.get(timeout=_PAUSE_S))
        return found


def open_services(settings: Settings) -> Services:
    """Return the services of these settings. This does not connect yet."""
    # The first submit would import it, which takes half a second.
    importlib.import_module("ssvm_worker.wiring.celery_sender")
    waker = _Waker()
    jobs = Client(settings, waker.wake, of_server=True)
    waker.start(jobs.send_wakeup)
    return Services(
        settings,
        jobs,
        ImageStores(settings),
        server_names(settings),
        open_cloudstack_web(settings),
        open_links(settings),
        settings.state_dir / "cloudstack",
    )
