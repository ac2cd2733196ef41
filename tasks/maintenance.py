"""The maintenance lane."""

from __future__ import annotations

from typing import Any

from ssvm_worker.runner.messages import Message, job_id_of
from ssvm_worker.runner.run import run_job
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import send_wakeup

from .app import JOB, TASK, app, settings


@app.task(name="ssvm.consolidate", **JOB)
def consolidate(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the removal of a snapshot that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.copy", **JOB)
def copy(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the copy that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.transfer", **JOB)
def transfer(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the transfer that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.split", **JOB)
def split(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the split that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.verify", **JOB)
def verify(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the verify that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.delete", **JOB)
def delete(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the delete that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.cleanup", **JOB)
def cleanup(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the clean-up that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.retry", **TASK)
def retry(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Queue a failed or cancelled job again: ``["ID"]`` or ``[{"job_id": "ID", "by": "USER"}]``."""
    job_id, by = job_id_of(Message.of(task, args, kwargs))
    with open_ledger(settings) as ledger:
        record = ledger.retry(job_id, by)
        send_wakeup(settings, record)
    return {"job_id": job_id, "state": record.state}


@app.task(name="ssvm.cancel", **TASK)
def cancel(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Cancel a queued or running job: ``["ID"]`` or ``[{"job_id": "ID", "by": "USER"}]``."""
    job_id, by = job_id_of(Message.of(task, args, kwargs))
    with open_ledger(settings) as ledger:
        record = ledger.cancel(job_id, by)
    return {"job_id": job_id, "state": record.state}
