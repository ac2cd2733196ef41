"""Create the Celery app. docs/explanation/decisions/ has the experiments behind its settings."""

from __future__ import annotations

from celery import Celery

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.record import queue_name
from ssvm_worker.wiring.celery_sender import make_queue, sending_app
from ssvm_worker.wiring.message_transport import MessageRoute, beat_store

from . import transport

#: The modules that register tasks.
TASKS = ("tasks.download", "tasks.upload", "tasks.backup", "tasks.maintenance", "tasks.schedule")
#: Seconds without a renewal of the lock after which another beat becomes active.
_BEAT_LOCK_S = 60


def make_app(settings: Settings) -> Celery:
    """Return the app of a worker."""
    route = MessageRoute.of(settings)
    transport.register()
    app = sending_app(route)
    app.set_default()
    app.conf.update(
        include=TASKS,
        # Acknowledge early, and prefetch no message. With a late ack, a worker that loses its broker also loses its
        # messages: they return an hour later, or never. The reaper replaces redelivery.
        task_acks_late=False,
        worker_disable_prefetch=not route.is_rabbitmq,  # Celery supports this only with Redis
        worker_prefetch_multiplier=1,
        # The reaper queues the jobs of lost workers again. If Celery did so too, there would be duplicates.
        task_retry_on_worker_lost=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_consumer="tasks.consumer:Consumer",
        worker_pool="prefork",
        worker_concurrency=settings.worker.concurrency,
        # runner.run drains the running job. Celery would sleep the full time even if the job ends.
        worker_soft_shutdown_timeout=0,
        worker_send_task_events=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # Otherwise a master that refuses writes (NOREPLICAS) is an "unrecoverable error" and ends the worker.
        broker_channel_error_retry=True,
        broker_transport_options=route.options(answer_s=30, waits=True),
        # Seconds. A silent connection to RabbitMQ is closed after two missed heartbeats. Redis has no heartbeats.
        broker_heartbeat=30,
        task_queues=[make_queue(queue_name(settings.zone, lane)) for lane in settings.worker.lanes],
        task_default_queue=queue_name(settings.zone, "maintenance"),
        # Beat with RedBeat (extra redbeat) keeps the schedule and its lock in the broker, below broker.prefix. Another
        # beat becomes active a minute after the last renewal of the lock. RedBeat's default is 25 minutes.
        **beat_store(settings),
        redbeat_lock_timeout=_BEAT_LOCK_S,
        beat_max_loop_interval=_BEAT_LOCK_S // 5,
    )
    return app
