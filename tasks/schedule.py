"""What beat adds: the schedule of config/crontab, for those who prefer it.

    python -P -m tasks beat                                    one of them
    python -P -m tasks beat -S redbeat.RedBeatScheduler        any number, of which one acts (extra ``redbeat``)

Not needed, and no harm beside cron, timers and the workers' own reapers: of all rounds one at a time acts, and two
clean-ups at once find what there is to find once.
"""

from __future__ import annotations

from typing import Any

from celery.schedules import crontab

from ssvm_worker.ledger.record import queue_name
from ssvm_worker.wiring.assembly import open_ledger
from ssvm_worker.wiring.celery_sender import ring, standing

from .app import TASK, app, settings

#: Seconds between two messages: as long as a claim lasts, since the workers' own rounds are quicker anyway. One that
#: nobody has taken by the time of the next is dropped.
_EVERY_S = settings.ledger.claim_s
_QUEUE = queue_name(settings.zone, "maintenance")

app.conf.beat_schedule = {
    "reap": {"task": "ssvm.reap", "schedule": _EVERY_S, "options": {"queue": _QUEUE, "expires": _EVERY_S}},
    # At the time of config/crontab, by UTC.
    "cleanup": {
        "task": "ssvm.cleanup",
        "schedule": crontab(hour="3", minute="17"),
        "args": [{"older_than": "24h"}],
        "options": {"queue": _QUEUE},
    },
}


@app.task(name="ssvm.reap", **TASK)
def reap(_task: Any) -> dict[str, Any]:
    """One round of the reaper: queue again what lost its worker or its message."""
    with open_ledger(settings) as ledger:
        # By its own interval: rounds that are further apart than the ledger is told look like an outage to it.
        found = ledger.reap(_EVERY_S, settings.retry.max_attempts, standing(settings))
        rung = [record.job_id for record in found if ring(settings, record)]
    return {"rung": rung}
