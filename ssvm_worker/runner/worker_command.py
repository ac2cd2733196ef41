"""The command lines of a worker and of Flower, for ``ssvm worker``, for tests and for unit files."""

from __future__ import annotations

import sys
import uuid

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.record import queue_name


def worker_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Return the command of a worker with these settings, and its environment beside SSVM_CONFIG.

    With REMAP_SIGTERM a SIGTERM does not wait for hours: running jobs are asked to stop, and are queued again.
    """
    queues = ",".join(queue_name(settings.zone, lane) for lane in settings.worker.lanes)
    argv = [sys.executable, "-P", "-m", "tasks", "worker"]
    argv += ["-Q", queues, "-c", str(settings.worker.concurrency), "-n", f"{settings.zone}-{uuid.uuid4().hex[:6]}@%h"]
    argv += ["--loglevel", settings.log.level.upper(), "--without-gossip", "--without-mingle"]
    return argv, {"REMAP_SIGTERM": "SIGQUIT"}


def flower_command(port: int, login: str) -> tuple[list[str], dict[str, str]]:
    """Return the command of a Flower on loopback for a trial, and its environment. *login* is ``name:password``.

    In production Flower reads config/flower/flowerconfig.py. A login on the command line would show in ``ps``.
    """
    argv = [sys.executable, "-P", "-m", "tasks.flower", "--address=127.0.0.1", f"--port={port}"]
    return argv, {"FLOWER_BASIC_AUTH": login}
