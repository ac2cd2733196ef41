"""Send messages through Celery, and count those that wait in RabbitMQ.

A message only wakes a worker. A lost message delays a job by seconds, but never loses it. The worker claims the next
job of the lane (tasks/claim_strategy.py). Importing Celery takes half a second, so import this module only to send.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from celery import Celery
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ObjectNotFound, StoreUnavailable
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import INBOUND, Record

from .message_transport import MessageRoute

_LOG = logging.getLogger("ssvm.wakeup")
#: One retry if the broker is unreachable. The reaper sends the message again anyway.
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}


def send_wakeup(settings: Settings, record: Record) -> bool:
    """Send the wake-up message of a queued job. Return False if the broker is unreachable.

    The reaper sends the message later in that case. The message contains only the id of the job, because Celery shows
    messages to every user. An upload through `ssvm serve` needs no message: it waits for its client.
    """
    if record.lane == INBOUND:
        return True
    try:
        sender(MessageRoute.of(settings)).send_task(
            f"ssvm.{record.job}",
            args=[{"job_id": record.job_id}],
            task_id=task_id(record.job_id, record.attempted + 1),
            root_id=record.job_id,
            queue=make_queue(record.queue),
            retry_policy=_RETRY,
        )
    except OperationalError as error:
        _LOG.warning("job %s: the wake-up message was not sent, the reaper will send it: %s", record.job_id, error)
        return False
    return True


def task_id(job_id: str, number: int) -> str:
    """Return the id of the task for an attempt. It is the id of the job for the first one.

    Later attempts need another id: Celery would not run them if the task was once revoked.
    """
    return job_id if number == 1 else f"{job_id}.{number}"


def job_of_task(ledger: Ledger, task_id: str) -> Record | None:
    """Return the job of a task, or None. Its id is that of the job, or with a suffix for the attempt."""
    stem, dot, number = task_id.rpartition(".")
    for job_id in (task_id, stem) if dot and number.isdecimal() else (task_id,):
        with suppress(ObjectNotFound):
            return ledger.get(job_id)
    return None


@lru_cache(maxsize=4)
def sender(route: MessageRoute) -> Celery:
    """Return the app of this process for that route. It keeps its connections."""
    return sending_app(route)


def sending_app(route: MessageRoute) -> Celery:
    """Return a new app that can send messages on that route. It does not become the default app."""
    app = Celery("ssvm", broker=route.celery_url, set_as_current=False)
    app.conf.update(
        # The ledger stores the results.
        task_ignore_result=True,
        task_default_exchange="",
        accept_content=["json"],
        task_serializer="json",
        broker_use_ssl=route.tls,
        broker_connection_timeout=5,
        broker_transport_options=route.options(answer_s=5),
    )
    return app


def make_queue(name: str) -> Queue:
    """Return a queue on the default exchange. It needs no binding: senders can push to the Redis list of that name."""
    return Queue(name, Exchange(""), routing_key=name)  # type: ignore[no-untyped-call]


def queue_checker(settings: Settings) -> Callable[[str], bool] | None:
    """Return a function for ``Ledger.reap`` that checks a queue of RabbitMQ for messages.

    Returns None if the messages are in Redis, where the ledger sees them itself. Each queue is checked once. A queue
    that cannot be checked counts as not empty, because sending would fail too.
    """
    route = MessageRoute.of(settings)
    return lru_cache(lambda queue: count_waiting(route, queue) != 0) if route.is_rabbitmq else None


def count_waiting(route: MessageRoute, queue: str) -> int | None:
    """Return the number of messages in a queue of RabbitMQ that no worker has taken. None: RabbitMQ does not answer."""
    try:
        return count_messages(route, queue)[0]
    except StoreUnavailable as error:
        _LOG.info("queue %s: the messages cannot be counted: %s", queue, error)
        return None


def count_messages(route: MessageRoute, queue: str) -> tuple[int, int]:
    """Return the numbers of messages and workers of a queue, 0 for a missing queue. Raise StoreUnavailable."""
    try:
        with sender(route).connection_or_acquire() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            return _declared(connection, queue)
    except OperationalError as error:
        remedy = "Check broker.messages and ca_file"
        raise StoreUnavailable(f"RabbitMQ cannot be used: {error}", route.shown, remedy) from error


def _declared(connection: Connection, queue: str) -> tuple[int, int]:
    try:
        with connection.channel() as channel:  # type: ignore[no-untyped-call]  # a new channel, because a refusal closes it
            found = channel.queue_declare(queue, passive=True)
    except connection.channel_errors as error:
        if getattr(error, "code", 0) == 404:
            return 0, 0
        raise OperationalError(str(error)) from error
    except connection.connection_errors as error:
        raise OperationalError(str(error)) from error
    return int(found.message_count), int(found.consumer_count)
