"""What the commands of a management server use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.client import Client
from ssvm_worker.config.schema import Settings


@dataclass(frozen=True)
class Services:
    """The parts of this program that a command may use. All of them are thread-safe."""

    settings: Settings
    #: Submits, reads, retries and cancels jobs.
    jobs: Client
    #: The directory for files of the agent.
    state_dir: Path


def open_services(settings: Settings) -> Services:
    """Return the services of these settings. This does not connect yet."""
    return Services(settings, Client(settings), settings.state_dir / "cloudstack")
