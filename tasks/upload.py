"""The upload lane."""

from __future__ import annotations

from typing import Any

from .app import JOB, app, settings
from .bridge import run_job
from .intake import Message


@app.task(name="ssvm.upload", **JOB)
def upload(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Run the upload that the message asks for."""
    return run_job(settings, Message.of(task, args, kwargs))
