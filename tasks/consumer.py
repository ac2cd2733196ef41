"""Celery's consumer of messages. No message may stop the worker, or return to its queue without end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.runner.messages import refuse, screen
from ssvm_worker.wiring.assembly import kept_ledger

from .app import settings

_LOG = logging.getLogger("ssvm.messages")


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Screens each message before Celery reads it. A refused message is rejected, and becomes a failed job."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Return Celery's handler of messages, with a screening before it."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> None:
            try:
                screen(message)
                task = message.headers["task"]
                if task not in self.app.tasks or task.startswith("celery."):  # celery.* tasks run their arguments
                    what = f"There is no task {task!r:.200}"
                    raise InvalidRequest(what, "", "See docs/reference/jobs.md for the known tasks")
                handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # noqa: BLE001 - an error here ends this worker, and then the next one
                self._refuse(message, error)

        return on_message

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Refuse a body that kombu cannot decode. A traceback would not explain more."""
        self._refuse(message, InvalidRequest(f"The message cannot be read: {exc}", "", "See docs/reference/jobs.md"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 - Celery's signature
        """Refuse a task that Celery does not accept."""
        self._refuse(
            message, InvalidRequest(f"Celery cannot read the message: {exc}", "", "See docs/reference/jobs.md")
        )

    def _refuse(self, message: Any, error: Exception) -> None:
        known = isinstance(error, WorkerError)
        headers = message.headers if isinstance(message.headers, dict) else {}
        name = f"{headers.get('task')!a:.100} with id {headers.get('id')!a:.140}"
        _LOG.error("a message of task %s is refused: %s", name, error, exc_info=None if known else error)
        try:
            refuse(kept_ledger(settings), settings, message, error)
        except Exception as missed:  # noqa: BLE001 - the message must be rejected anyway
            _LOG.error("no failed job is stored for the message: %s", missed)
        if not message.acknowledged:
            message.reject_log_error(_LOG, self.connection_errors)
