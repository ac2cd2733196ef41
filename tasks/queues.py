"""Looks at the queues of RabbitMQ; those of Redis are lists, which the ledger sees by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

from kombu.connection import Connection
from kombu.exceptions import OperationalError

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.record import queue_name
from ssvm_worker.operations.doctor import Finding
from ssvm_worker.wiring.celery_sender import sender
from ssvm_worker.wiring.message_transport import MessageRoute

_LOG = logging.getLogger("ssvm.queues")


def standing(settings: Settings) -> Callable[[str], bool] | None:
    """What ``Ledger.reap`` must ask when messages go through RabbitMQ; None: the ledger can see them itself.

    Each queue is asked once. One that cannot be asked counts as full: ringing would be in vain too.
    """
    route = MessageRoute.of(settings)
    return lru_cache(lambda queue: waiting(route, queue) != 0) if route.is_rabbitmq else None


def examine(settings: Settings) -> list[Finding]:
    """For `ssvm doctor`: whether RabbitMQ answers, and what stands in our queues; nothing where Redis has them."""
    route = MessageRoute.of(settings)
    if not route.is_rabbitmq:
        return []
    queues = [queue_name(settings.zone, lane) for lane in settings.worker.lanes]
    try:
        looks = [(queue, *_look(route, queue)) for queue in queues]
    except OperationalError as error:
        what = f"StoreUnavailable: RabbitMQ cannot be used: {error}: {route.shown}. Check broker.messages and ca_file"
        return [Finding("messages", False, f"{what}; jobs are kept in the ledger, and wait")]
    told = [f"{queue}: {count} waiting, {workers} workers" for queue, count, workers in looks if workers or count]
    return [Finding("messages", True, f"{route.shown}; {', '.join(told) or 'no worker has made its queues yet'}")]


def waiting(route: MessageRoute, queue: str) -> int | None:
    """Messages in a queue of RabbitMQ that no worker has taken; None if it cannot be asked."""
    try:
        return _look(route, queue)[0]
    except OperationalError as error:
        _LOG.info("queue %s is not looked at: %s", queue, error)
        return None


def _look(route: MessageRoute, queue: str) -> tuple[int, int]:
    """Messages in that queue, and workers that listen; none of either if there is no such queue."""
    with sender(route).connection_or_acquire() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        return _declared(connection, queue)


def _declared(connection: Connection, queue: str) -> tuple[int, int]:
    try:
        with connection.channel() as channel:  # of its own: a refusal closes it
            found = channel.queue_declare(queue, passive=True)
    except connection.channel_errors as error:
        if getattr(error, "code", 0) == 404:
            return 0, 0
        raise OperationalError(str(error)) from error
    except connection.connection_errors as error:
        raise OperationalError(str(error)) from error
    return int(found.message_count), int(found.consumer_count)
