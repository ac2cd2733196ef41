"""The log of a worker: Celery's lines in our form, and with the job's id where they name one."""

from __future__ import annotations

import logging
from typing import Any

from celery.signals import setup_logging, task_postrun, task_prerun

from ssvm_worker.config.schema import Settings
from ssvm_worker.operations import logs

from .safe_repr import job_of


def attach(settings: Settings) -> None:
    """Log as the settings say, in place of Celery's own set-up; pool processes inherit it."""

    def start(**_: Any) -> None:
        logs.start(settings.log)
        for each in logging.getLogger().handlers:
            each.addFilter(_name_the_job)

    def end(**_: Any) -> None:
        """Not at the job's own end: what Celery says of it comes later."""
        logs.end()

    setup_logging.connect(start, weak=False)
    task_prerun.connect(end, weak=False)
    task_postrun.connect(end, weak=False)


def _name_the_job(record: logging.LogRecord) -> bool:
    """Celery's lines about a message, in the main process, have what it may know of it as their arguments."""
    given = record.args
    if record.name.startswith("celery.worker.") and isinstance(given, dict) and not hasattr(record, "job_id"):
        record.job_id = job_of(str(given.get("args")))
    return True
