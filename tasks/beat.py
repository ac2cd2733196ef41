"""What beat adds: a round of the reaper in a pool process, should the reaper threads of all workers hang.

    celery -A tasks.app beat

Not needed, and as many as you like: of all rounds, one at a time acts.
"""

from __future__ import annotations

from typing import Any

from ssvm_worker.assembly import open_ledger
from ssvm_worker.ledger import queue_name

from .app import TASK, app, settings
from .ring import ring

#: Seconds between two messages: as long as a claim lasts, since the workers' own rounds are quicker anyway. One that
#: nobody has taken by the time of the next is dropped.
_EVERY_S = settings.ledger.claim_s

app.conf.beat_schedule = {
    "reap": {
        "task": "ssvm.reap",
        "schedule": _EVERY_S,
        "options": {"queue": queue_name(settings.zone, "maintenance"), "expires": _EVERY_S},
    }
}


@app.task(name="ssvm.reap", **TASK)
def reap(_task: Any) -> dict[str, Any]:
    """One round of the reaper: queue again what lost its worker or its message."""
    with open_ledger(settings) as ledger:
        found = ledger.reap(settings.ledger.reap_s, settings.retry.max_attempts)
        rung = [record.job_id for record in found if ring(settings, record)]
    return {"rung": rung}
