"""Start and stop the services of a worker: log, embedded broker, reaper, registration, mounts."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery, bootsteps
from celery.signals import setup_logging, task_postrun, task_prerun, worker_init, worker_process_shutdown
from celery.worker import state as celery_state

from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.embedded import EmbeddedBroker
from ssvm_worker.operations import logs, traces
from ssvm_worker.runner.mounts import MountKeeper
from ssvm_worker.runner.reaper import Reaper
from ssvm_worker.runner.registration import WorkerRegistration

from . import remote_control
from .safe_repr import job_of


def attach(app: Celery, settings: Settings) -> None:
    """Give the workers of this app all services."""

    def start_log(**_: Any) -> None:
        logs.start(settings.log)
        for each in logging.getLogger().handlers:
            each.addFilter(_add_job_id)

    def start_broker(**_: Any) -> None:
        broker = EmbeddedBroker(settings.state_dir)
        broker.start()
        atexit.register(broker.stop)

    def load_jobs(**_: Any) -> None:
        """Import all jobs before the pool forks: its processes share the memory, and their first job starts faster."""
        for job in JOBS.values():
            _ = job.module

    def register(worker: Any) -> WorkerRegistration:
        active = partial(len, celery_state.active_requests)
        return WorkerRegistration(settings, worker.hostname, active=active, connected=partial(_is_connected, worker))

    remote_control.take_over(settings)
    app.steps["worker"].update(
        (
            _step("ReaperStep", lambda _: Reaper(settings)),
            _step("RegistrarStep", register),
            _step("MountStep", lambda _: MountKeeper(settings)),
        )
    )
    setup_logging.connect(start_log, weak=False)  # replaces Celery's set-up; pool processes inherit it.
    # Celery logs the outcome after the end of the job, so the log keeps the job until here.
    task_prerun.connect(_end_job_of_log, weak=False)
    task_postrun.connect(_end_job_of_log, weak=False)
    worker_init.connect(load_jobs, weak=False)
    # A pool process does not run atexit, so it sends its remaining spans here.
    worker_process_shutdown.connect(lambda **_: traces.close(), weak=False)
    if settings.broker.embedded:
        worker_init.connect(start_broker, weak=False)


def _step(name: str, create: Callable[[Any], object]) -> type:
    """Return a boot step that starts after the pool and stops before it.

    So no pool process is forked while a thread holds a lock, and the registration stops while jobs still run.
    """
    members = {"requires": ("celery.worker.components:Pool",), "create": lambda _, worker: create(worker)}
    return type(name, (bootsteps.StartStopStep,), members)


def _is_connected(worker: Any) -> bool:
    """Return whether Celery has a connection. Celery drops it before it searches for another."""
    consumer = getattr(worker, "consumer", None)
    return bool(consumer and consumer.connection)


def _end_job_of_log(**_: Any) -> None:
    logs.end()


def _add_job_id(record: logging.LogRecord) -> bool:
    """Add the job to Celery's lines of the main process about a message. Their arguments contain its id."""
    given = record.args
    if record.name.startswith("celery.worker.") and isinstance(given, dict) and not hasattr(record, "job_id"):
        record.job_id = job_of(str(given.get("args")))
    return True
