"""Replace the commands of Celery's remote control that affect jobs: a revoke cancels in the ledger, others are refused.

Celery frees the slot of a revoked task, although the task's process continues. The worker would then claim a job for
that slot. No process would run it, and the job would lose an attempt.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.worker.control import control_command, nok, ok

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.wiring.assembly import kept_ledger
from ssvm_worker.wiring.celery_sender import job_of_task

#: The largest number of jobs of one command. The worker does nothing else meanwhile.
_MAX_JOBS = 100
#: Refused commands, and what to do instead. They would contradict settings that the ledger and `ssvm workers` use.
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
    "hello": "Workers do not share revoked tasks",
}


def take_over(settings: Settings) -> None:
    """Replace Celery's commands in this process. Safe to repeat."""

    def revoke(_: Any, task_id: Any, **__: Any) -> Any:
        """Cancel jobs in the ledger, by the ids of their tasks."""
        ids = [each for each in (task_id if isinstance(task_id, list) else [task_id]) if isinstance(each, str)]
        try:
            return ok([_cancelled(settings, each) for each in ids[:_MAX_JOBS]])
        except WorkerError as error:
            return nok(str(error))

    for name in ("revoke", "terminate"):
        control_command(name=name, variadic="task_id", signature="[id1 [id2 [...]]]")(revoke)
    for name, remedy in REFUSED.items():
        control_command(name=name, variadic="given", help=remedy)(partial(_refuse, name, remedy))


def _cancelled(settings: Settings, task_id: str) -> str:
    """Cancel the job of a task. Every worker receives the command, so the job may be cancelled already."""
    ledger = kept_ledger(settings)
    record = job_of_task(ledger, task_id)
    if record is None:
        return f"{task_id}: there is no such job"
    if record.ended or record.cancel_requested:
        return f"{record.job_id}: it is {record.state}"
    return f"{record.job_id}: {ledger.cancel(record.job_id, 'celery control').state}"


def _refuse(name: str, remedy: str, _: Any, **__: Any) -> Any:
    return nok(f"{name} is refused. {remedy}")
