"""The Celery app, with the settings that were tried: docs/decisions/ says with what result."""

from __future__ import annotations

from celery import Celery

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.record import queue_name
from ssvm_worker.wiring.celery_sender import make_queue, sending_app
from ssvm_worker.wiring.message_transport import MessageRoute, beat_store

from . import transport

#: The modules that register tasks.
TASKS = ("tasks.download", "tasks.upload", "tasks.backup", "tasks.maintenance", "tasks.schedule")
#: Seconds without a renewal after which another beat of several takes over.
_BEAT_LOCK_S = 60


def make_app(settings: Settings) -> Celery:
    """The app of a worker."""
    route = MessageRoute.of(settings)
    transport.register()
    app = sending_app(route)
    app.set_default()
    app.conf.update(
        include=TASKS,
        # Early ack, and no message in hand that is not run: what lies in a worker's hands when the broker goes away
        # comes back an hour later with a late ack, or never. The reaper does what redelivery should do.
        task_acks_late=False,
        worker_disable_prefetch=not route.is_rabbitmq,  # which Celery can do with Redis only
        worker_prefetch_multiplier=1,
        # The reaper takes care of lost workers; two that requeue would make duplicates.
        task_retry_on_worker_lost=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_consumer="tasks.consumer:Consumer",
        worker_pool="prefork",
        worker_concurrency=settings.worker.concurrency,
        # The running job drains itself (runner.shutdown). Celery would sleep the full time even if the job ends.
        worker_soft_shutdown_timeout=0,
        worker_send_task_events=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A master that takes no writes (NOREPLICAS) is an "unrecoverable error" otherwise, and ends the worker.
        broker_channel_error_retry=True,
        broker_transport_options=route.options(answer_s=30, waits=True),
        # A line to RabbitMQ that has died in silence is noticed after two of these. Redis knows none.
        broker_heartbeat=30,
        task_queues=[make_queue(queue_name(settings.zone, lane)) for lane in settings.worker.lanes],
        task_default_queue=queue_name(settings.zone, "maintenance"),
        # Beat with RedBeat (extra redbeat): the schedule and the lock lie in our broker, below our prefix. Another beat
        # takes over when the lock has not been renewed for a minute, in place of RedBeat's 25.
        **beat_store(settings),
        redbeat_lock_timeout=_BEAT_LOCK_S,
        beat_max_loop_interval=_BEAT_LOCK_S // 5,
    )
    return app
