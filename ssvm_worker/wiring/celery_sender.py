"""Send messages through Celery, and count those that wait in RabbitMQ.

A message only wakes a worker: losing one costs seconds, never the job. The worker takes the next job of the lane
(tasks/claim_strategy.py). Celery takes half a second to import, so import this module only to send a message.
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

_LOG = logging.getLogger("ssvm.ring")
#: A broker that is away gets one more chance; the reaper rings again anyway.
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}


def ring(settings: Settings, record: Record) -> bool:
    """Send the doorbell of a queued job; False if the broker is away, and then the reaper will ring.

    The message holds the job's id and nothing else, because Celery shows messages to whoever looks.
    An upload waits for its sender, whom no message reaches.
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
        _LOG.warning("job %s is not rung yet: %s", record.job_id, error)
        return False
    return True


def task_id(job_id: str, number: int) -> str:
    """The job's id for its first attempt; a task that was once revoked keeps later ones from running otherwise."""
    return job_id if number == 1 else f"{job_id}.{number}"


def job_of_task(ledger: Ledger, task_id: str) -> Record | None:
    """The job of a task: its id is the job's, or the job's with the attempt's number behind it."""
    stem, dot, number = task_id.rpartition(".")
    for job_id in (task_id, stem) if dot and number.isdecimal() else (task_id,):
        with suppress(ObjectNotFound):
            return ledger.get(job_id)
    return None


@lru_cache(maxsize=4)
def sender(route: MessageRoute) -> Celery:
    """The app by which this process sends that way; its connections are kept."""
    return sending_app(route)


def sending_app(route: MessageRoute) -> Celery:
    """An app that can send messages that way, and is nobody's default."""
    app = Celery("ssvm", broker=route.celery_url, set_as_current=False)
    app.conf.update(
        # The ledger knows the results.
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
    """A queue behind the default exchange: it needs no binding, so that pushing to the list of that name is enough."""
    return Queue(name, Exchange(""), routing_key=name)  # type: ignore[no-untyped-call]


def standing(settings: Settings) -> Callable[[str], bool] | None:
    """What ``Ledger.reap`` must ask when messages go through RabbitMQ; None: the ledger can see them itself.

    Each queue is asked once. One that cannot be asked counts as full: ringing would be in vain too.
    """
    route = MessageRoute.of(settings)
    return lru_cache(lambda queue: waiting(route, queue) != 0) if route.is_rabbitmq else None


def waiting(route: MessageRoute, queue: str) -> int | None:
    """Count the messages in a queue of RabbitMQ that no worker has taken; None if RabbitMQ does not answer."""
    try:
        return look(route, queue)[0]
    except StoreUnavailable as error:
        _LOG.info("queue %s is not counted: %s", queue, error)
        return None


def look(route: MessageRoute, queue: str) -> tuple[int, int]:
    """Count the messages and the workers of a queue; both are 0 if there is no such queue. Raises StoreUnavailable."""
    try:
        with sender(route).connection_or_acquire() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            return _declared(connection, queue)
    except OperationalError as error:
        remedy = "Check broker.messages and ca_file"
        raise StoreUnavailable(f"RabbitMQ cannot be used: {error}", route.shown, remedy) from error


def _declared(connection: Connection, queue: str) -> tuple[int, int]:
    try:
        with connection.channel() as channel:  # type: ignore[no-untyped-call]  # of its own: a refusal closes it
            found = channel.queue_declare(queue, passive=True)
    except connection.channel_errors as error:
        if getattr(error, "code", 0) == 404:
            return 0, 0
        raise OperationalError(str(error)) from error
    except connection.connection_errors as error:
        raise OperationalError(str(error)) from error
    return int(found.message_count), int(found.consumer_count)
