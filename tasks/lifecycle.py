"""What lives and dies with a worker's main process: the embedded broker, the reaper, the registrar, the mounts."""

from __future__ import annotations

import atexit
from functools import partial
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_init, worker_process_shutdown
from celery.worker import state as celery_state

from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.embedded import EmbeddedBroker
from ssvm_worker.operations.traces import close
from ssvm_worker.runner.mounts import MountKeeper
from ssvm_worker.runner.reaper import Reaper
from ssvm_worker.runner.registration import WorkerRegistration

from . import remote_control


def attach(app: Celery, settings: Settings) -> None:
    """Make a worker of this app do all of it."""

    class ReaperStep(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts behind the pool, so that no pool process is forked while the threads hold a lock."""

        requires = ("celery.worker.components:Pool",)

        def create(self, _worker: Any) -> Reaper:
            return Reaper(settings)

    def start_broker(**_: Any) -> None:
        broker = EmbeddedBroker(settings.state_dir)
        broker.start()
        atexit.register(broker.stop)

    class RegistrarStep(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts behind the pool likewise, and so is told to stop before that, while jobs still run."""

        requires = ("celery.worker.components:Pool",)

        def create(self, worker: Any) -> WorkerRegistration:
            active = partial(len, celery_state.active_requests)
            return WorkerRegistration(
                settings, worker.hostname, active=active, connected=partial(_is_connected, worker)
            )

    def load_jobs(**_: Any) -> None:
        """Once, before the pool forks: its processes share the memory, and the first job of each need not wait."""
        for job in JOBS.values():
            _ = job.module

    remote_control.take_over(settings)
    app.steps["worker"].update((ReaperStep, RegistrarStep, _mount_step(settings)))
    worker_init.connect(load_jobs, weak=False)
    worker_process_shutdown.connect(_send_spans, weak=False)
    if settings.broker.embedded:
        worker_init.connect(start_broker, weak=False)


def _is_connected(worker: Any) -> bool:
    """Tell whether Celery has a connection; it drops the connection while it looks for another."""
    consumer = getattr(worker, "consumer", None)
    return bool(consumer and consumer.connection)


def _send_spans(**_: Any) -> None:
    """At the end of a pool process, in which atexit means nothing."""
    close()


def _mount_step(settings: Settings) -> type:
    class MountStep(bootsteps.StartStopStep):  # type: ignore[misc]
        """Behind the pool, as the others are."""

        requires = ("celery.worker.components:Pool",)

        def create(self, _worker: Any) -> MountKeeper:
            return MountKeeper(settings)

    return MountStep
