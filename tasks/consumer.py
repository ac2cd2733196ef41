"""Celery's consumer of messages, of which none may stop the worker or come back to its queue for ever."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker.consumer import Consumer as CelerysConsumer

from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.runner.messages import refuse
from ssvm_worker.runner.screening import screen
from ssvm_worker.wiring.assembly import kept_ledger

from .app import settings

_LOG = logging.getLogger("ssvm.messages")


class Consumer(CelerysConsumer):  # type: ignore[misc]
    """Screens each message before Celery's own handler sees it; what fails is a failed job, and is rejected."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """As Celery's own."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> None:
            try:
                screen(message)
                task = message.headers["task"]
                if task not in self.app.tasks or task.startswith("celery."):  # those run what their arguments say
                    what = f"There is no task {task!r:.200}"
                    raise InvalidRequest(what, "", "See docs/jobs.md for the tasks there are")
                handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # noqa: BLE001 - what is raised here ends the worker, and the next one
                self._refuse(message, error)

        return on_message

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """What kombu says of a body; it has no traceback that would tell more."""
        self._refuse(message, InvalidRequest(f"The message cannot be read: {exc}", "", "See docs/jobs.md"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 - Celery's signature
        """What Celery says of a task."""
        self._refuse(message, InvalidRequest(f"Celery cannot read the message: {exc}", "", "See docs/jobs.md"))

    def _refuse(self, message: Any, error: Exception) -> None:
        known = isinstance(error, WorkerError)
        headers = message.headers if isinstance(message.headers, dict) else {}
        name = f"{headers.get('task')!a:.100} with id {headers.get('id')!a:.140}"
        _LOG.error("a message of task %s is refused: %s", name, error, exc_info=None if known else error)
        try:
            refuse(kept_ledger(settings), settings, message, error)
        except Exception as missed:  # noqa: BLE001 - the message must go all the same
            _LOG.error("no job is written for it: %s", missed)
        if not message.acknowledged:
            message.reject_log_error(_LOG, self.connection_errors)
