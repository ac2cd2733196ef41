"""What a worker's main process does with a doorbell: it takes the job that is next in that lane, whichever it is.

The message is exchanged for one of that job before Celery looks at it. So each of Celery's tasks is one attempt at one
job, under the job's own name and id, whosever message woke the worker up; logs, events, Flower and its buttons need not
know that there was another. A doorbell that finds no job is acknowledged, and nobody hears of it.
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
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import ClaimedJob
from ssvm_worker.operations.logs import about
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.runner.messages import Message, accept
from ssvm_worker.runner.screening import CLAIM
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import task_id

from .app import settings as of_this_worker

_LOG = logging.getLogger("ssvm.doorbell")
#: A message, its decoded body if it is of an old protocol, what acknowledges and what rejects it, what to call then.
Handler = Callable[..., Any]


def strategy(task: Any, app: Celery, consumer: Any, settings: Settings = of_this_worker, **_: Any) -> Handler:
    """Celery's execution strategy (``Task.Strategy``) of all tasks that run jobs."""
    ledger = open_ledger(settings)
    handlers: dict[str, Handler] = {}

    def handler_of(name: str) -> Handler:
        if name not in handlers:
            handlers[name] = default(app.tasks[name], app, consumer)
        return handlers[name]

    def on_message(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
        name = task.name
        if _has_room(consumer):
            heard = _read(message, name)
            try:
                taken = _take(ledger, settings, heard, consumer.hostname)
            except WorkerError as error:  # a pool process tries again, or says it where it counts
                with about(heard.job_id):
                    _LOG.info("message %s is handed on as it came: %s", heard.task_id, error)
            else:
                if taken is None:
                    return ack(_LOG, consumer.connection_errors)
                exchanged = _exchange(message, taken)
                # A job of another version is nobody's task; the pool process ends it as failed.
                name = exchanged if exchanged in app.tasks else name
        return handler_of(name)(message, body, ack, reject, callbacks, **kwargs)

    return on_message


def _has_room(consumer: Any) -> bool:
    """Whether a pool process is free. RabbitMQ gives more than that, and a claim must not wait for its process."""
    return bool(len(reserved_requests) < consumer.pool.num_processes)


def _read(message: Any, name: str) -> Message:
    """The message, which ssvm_worker/runner/screening.py has seen to."""
    args, kwargs, _ = message.payload
    parent = traceparent(message.headers.get("traceparent"))
    return Message(name.removeprefix("ssvm."), args, kwargs, message.headers["id"], parent)


def _take(ledger: Ledger, settings: Settings, message: Message, worker: str) -> ClaimedJob | None:
    """Write down what another server sent, before anything else; then take the next job."""
    if not message.is_doorbell:
        accept(ledger, settings, message)
    return ledger.claim_next(settings.zone, find_job(message.job).lane, worker)


def _exchange(message: Any, taken: ClaimedJob) -> str:
    """Make it a message of the job that was taken; returns the task's name."""
    name, own_id = f"ssvm.{taken.job}", task_id(taken.job_id, taken.number)
    shown = f"[{{'job_id': '{taken.job_id}'}}]"
    message.headers = {"lang": "py", "task": name, "id": own_id, "root_id": taken.job_id, "argsrepr": shown}
    message.headers[CLAIM] = [taken.job_id, taken.token]
    message.content_type, message.content_encoding = "application/json", "utf-8"
    message.body = json.dumps([[{"job_id": taken.job_id}], {}, {}])
    message._decoded_cache = None
    return name
