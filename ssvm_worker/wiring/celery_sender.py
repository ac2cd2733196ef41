"""The doorbell: a message that wakes a worker up for a job. Losing one costs seconds, never the job.

The worker that hears it takes whichever job of the lane is next: tasks/claim_strategy.py. Celery takes half a second to
import, so that this module is imported when a message is to be sent.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import lru_cache

from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ObjectNotFound
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
