"""The schedule of Celery beat, an alternative to config/crontab.

    python -P -m tasks beat                                    a single beat
    python -P -m tasks beat -S redbeat.RedBeatScheduler        many, of which one is active (extra ``redbeat``)

Beat is optional. It may run beside cron, timers and the reapers of the workers: only one round acts at a time, and two
clean-ups do not disturb each other.
"""

from __future__ import annotations

from typing import Any

from celery.schedules import crontab

from ssvm_worker.ledger.record import queue_name
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import queue_checker, send_wakeup

from .app import TASK, app, settings

#: Seconds between two messages: the length of a claim, because the reapers of the workers are faster anyway. A message
#: that no worker has received by then is dropped.
_EVERY_S = settings.ledger.claim_s
_QUEUE = queue_name(settings.zone, "maintenance")

app.conf.beat_schedule = {
    "reap": {"task": "ssvm.reap", "schedule": _EVERY_S, "options": {"queue": _QUEUE, "expires": _EVERY_S}},
    # The same time as in config/crontab, in UTC.
    "cleanup": {
        "task": "ssvm.cleanup",
        "schedule": crontab(hour="3", minute="17"),
        "args": [{"older_than": "24h"}],
        "options": {"queue": _QUEUE},
    },
}


@app.task(name="ssvm.reap", **TASK)
def reap(_task: Any) -> dict[str, Any]:
    """Run one round of the reaper: queue jobs again whose worker or message was lost."""
    with open_ledger(settings) as ledger:
        # The real interval: if rounds are further apart than stated, the ledger assumes an outage.
        found = ledger.reap(_EVERY_S, settings.retry.max_attempts, queue_checker(settings))
        woken = [record.job_id for record in found if send_wakeup(settings, record)]
    return {"woken": woken}
