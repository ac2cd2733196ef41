"""What the commands of a management server use."""

from __future__ import annotations

import importlib
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

from .deadlines import AfterBurst
from .image_stores import ImageStores


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


def open_services(settings: Settings) -> Services:
    """Return the services of these settings. This does not connect yet."""
    # The first commands would import them, which takes half a second.
    importlib.import_module("ssvm_worker.wiring.celery_sender")
    importlib.import_module("ssvm_worker.jobs.download.job")
    later = AfterBurst("waker")

    def wake(record: Record) -> None:
        """Send the message of a queued job later. If that fails or this process ends, the reaper sends it."""
        later.put(lambda: jobs.send_wakeup(record))

    jobs = Client(settings, wake, of_server=True)
    return Services(
        settings,
        jobs,
        ImageStores(settings),
        server_names(settings),
        open_cloudstack_web(settings),
        open_links(settings),
        settings.state_dir / "cloudstack",
    )
