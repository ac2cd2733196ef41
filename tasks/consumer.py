"""Celery's consumer of messages. No message may stop the worker, or return to its queue without end."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.loops import asynloop
from celery.worker.state import maybe_shutdown

from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.runner.messages import refuse, screen
from ssvm_worker.wiring.assembly import kept_ledger

from .app import settings

_LOG = logging.getLogger("ssvm.messages")


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Screens each message before Celery reads it. A refused message is rejected, and becomes a failed job.

    It also delays SIGTERM to the next turn of the event loop. Celery's handler waits for the results of the pool. If
    the handler interrupted a callback that has read half of a result, it would wait forever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._looping = False
        self._handlers: list[Callable[[], None]] = []
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self) -> None:
        """Take over the signals that end a worker, then consume until the worker ends."""
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, partial(self._on_signal, signal.getsignal(number)))
        super().start()

    def loop(self, *args: Any) -> None:
        """Run Celery's event loop."""
        self._looping = True
        try:
            asynloop(*args)
        finally:
            self._looping = False
            self._end()

    def register_with_event_loop(self, hub: Any) -> None:
        """Let a signal wake the event loop."""
        super().register_with_event_loop(hub)
        hub.add_reader(self._woken, self._on_wake)

    def _on_signal(self, handler: Any, *args: Any) -> None:
        """Keep Celery's handler for the event loop, or run it at once if no loop runs."""
        if self._looping:
            self._handlers.append(partial(handler, *args))
            os.write(self._wake, b".")
        else:
            handler(*args)

    def _on_wake(self) -> None:
        os.read(self._woken, 64)
        self._end()

    def _end(self) -> None:
        """Run the handler of the first signal, if there was one, and end the event loop."""
        if self._handlers:
            handler, self._handlers = self._handlers[0], []
            handler()
            maybe_shutdown()

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
