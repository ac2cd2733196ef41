"""Claim the next job of the lane when a message arrives. The message only wakes the worker.

Celery then gets a message of the claimed job instead. So each Celery task is one attempt of one job, under the job's
own name and id. Logs, events, Flower and its buttons do not see the other message. If no job can run, the message is
acknowledged and ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.worker.state import reserved_requests
from celery.worker.strategy import default

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.jobs import find_job
from ssvm_worker.ledger.record import ClaimedJob
from ssvm_worker.operations.logs import about
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.runner.messages import CLAIM, Message, accept
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import task_id

from .app import settings as own_settings

_LOG = logging.getLogger("ssvm.claim")
#: Arguments: a message, its decoded body for an old protocol, functions that acknowledge and reject it, callbacks.
Handler = Callable[..., Any]


def strategy(task: Any, app: Celery, consumer: Any, settings: Settings = own_settings, **_: Any) -> Handler:
    """Return the handler of messages for a task that runs jobs. This is Celery's ``Task.Strategy``."""
    ledger = open_ledger(settings)
    handlers: dict[str, Handler] = {}

    def on_message(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
        name = task.name
        # RabbitMQ sends more messages than there are free pool processes, and a claim must not wait for a process.
        if len(reserved_requests) < consumer.pool.num_processes:
            received = _read(message, name)
            try:
                # Store the job of a message from another program first. Then claim the next job of the lane.
                if not received.is_wakeup:
                    accept(ledger, settings, received)
                claimed = ledger.claim_next(settings.zone, find_job(received.job).lane, consumer.hostname)
            except WorkerError as error:  # a pool process tries again, and reports the error
                with about(received.job_id):
                    _LOG.info("message %s is passed on without a claim: %s", received.task_id, error)
            else:
                if claimed is None:
                    return ack(_LOG, consumer.connection_errors)
                # A job of another version has no task here. The pool process ends it as failed.
                name = f"ssvm.{claimed.job}" if f"ssvm.{claimed.job}" in app.tasks else name
                _replace(message, claimed, name)
        if name not in handlers:
            handlers[name] = default(app.tasks[name], app, consumer)
        return handlers[name](message, body, ack, reject, callbacks, **kwargs)

    return on_message


def _read(message: Any, name: str) -> Message:
    """Return a message that ``messages.screen`` has screened."""
    args, kwargs, _ = message.payload
    parent = traceparent(message.headers.get("traceparent"))
    return Message(name.removeprefix("ssvm."), args, kwargs, message.headers["id"], parent)


def _replace(message: Any, claimed: ClaimedJob, name: str) -> None:
    """Turn the message into one of the claimed job, for the task of that name."""
    own_id = task_id(claimed.job_id, claimed.number)
    shown = f"[{{'job_id': '{claimed.job_id}'}}]"
    message.headers = {"lang": "py", "task": name, "id": own_id, "root_id": claimed.job_id, "argsrepr": shown}
    message.headers[CLAIM] = [claimed.job_id, claimed.token]
    message.content_type, message.content_encoding = "application/json", "utf-8"
    message.body = json.dumps([[{"job_id": claimed.job_id}], {}, {}])
    message._decoded_cache = None
