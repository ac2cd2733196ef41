"""What the commands of a management server use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.client import Client
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.server_names import ServerNames
from ssvm_worker.wiring.server_names import server_names

from .image_stores import ImageStores


@dataclass(frozen=True)
class Services:
    """The parts of this program that a command may use. All of them are thread-safe."""

    settings: Settings
    #: Submits, reads, retries and cancels jobs.
    jobs: Client
    #: The image stores that commands name.
    stores: ImageStores
    #: What the server has set for all workers, and the connections of downloads.
    names: ServerNames
    #: The directory for files of the agent.
    state_dir: Path


def open_services(settings: Settings) -> Services:
    """Return the services of these settings. This does not connect yet."""
    return Services(
        settings, Client(settings), ImageStores(settings), server_names(settings), settings.state_dir / "cloudstack"
    )
