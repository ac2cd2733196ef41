"""Celery's remote control, where it touches jobs: a revoke cancels through the ledger, the rest is refused.

Celery frees the slot of a task that it has revoked, although the task's process goes on. The worker would then claim a
job for that slot. Nobody would run it, and it would lose an attempt.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import control_command, nok, ok

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.wiring.assembly import kept_ledger
from ssvm_worker.wiring.celery_sender import job_of_task

#: Jobs of one command: the worker does nothing else meanwhile.
_MOST = 100
#: What would contradict the settings by which the ledger and `ssvm workers` count, and what to do in its place.
REFUSED = {
    "revoke_by_stamped_headers": "Cancel each job: ssvm cancel ID",
    "rate_limit": "Set limits in worker.toml",
    "time_limit": "Jobs have no time limit. Cancel a job: ssvm cancel ID",
    "pool_grow": "Set worker.concurrency, or start another worker",
    "pool_shrink": "Set worker.concurrency",
    "pool_restart": "Restart the worker",
    "autoscale": "Set worker.concurrency, or start another worker",
    "add_consumer": "Set worker.lanes",
    "cancel_consumer": "Set worker.lanes",
    "hello": "Workers do not share what is revoked",
}


def take_over(settings: Settings) -> None:
    """Replace Celery's own commands in this process. Safe to repeat."""

    def revoke(_: Any, task_id: Any, **__: Any) -> Any:
        """Cancel jobs through the ledger, by the ids of their tasks."""
        ids = [each for each in (task_id if isinstance(task_id, list) else [task_id]) if isinstance(each, str)]
        try:
            return ok([_cancelled(settings, each) for each in ids[:_MOST]])
        except WorkerError as error:
            return nok(str(error))

    for name in ("revoke", "terminate"):
        control_command(name=name, variadic="task_id", signature="[id1 [id2 [...]]]")(revoke)
    for name, remedy in REFUSED.items():
        control_command(name=name, variadic="given", help=remedy)(_refusing(name, remedy))


def _cancelled(settings: Settings, task_id: str) -> str:
    """Every worker hears the command, so that the job may be cancelled already."""
    ledger = kept_ledger(settings)
    record = job_of_task(ledger, task_id)
    if record is None:
        return f"{task_id}: there is no such job"
    if record.ended or record.cancel_requested:
        return f"{record.job_id}: it is {record.state}"
    return f"{record.job_id}: {ledger.cancel(record.job_id, 'celery control').state}"


def _refusing(name: str, remedy: str) -> Any:
    return lambda _, **__: nok(f"{name} is refused. {remedy}")
