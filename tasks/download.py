"""The download lane."""

from __future__ import annotations

from typing import Any

from ssvm_worker.runner.messages import Message
from ssvm_worker.runner.run import run_job

from .app import JOB, app, settings


@app.task(name="ssvm.download", **JOB)
def download(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the download that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))


@app.task(name="ssvm.fetch", **JOB)
def fetch(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the fetch that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))
