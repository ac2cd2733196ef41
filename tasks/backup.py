"""The backup lane."""

from __future__ import annotations

from typing import Any

from ssvm_worker.runner.messages import Message
from ssvm_worker.runner.run import run_job

from .app import JOB, app, settings


@app.task(name="ssvm.backup", **JOB)
def backup(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the backup that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.restore", **JOB)
def restore(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the restore that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))
