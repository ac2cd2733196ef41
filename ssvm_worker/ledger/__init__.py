"""Which jobs there are, who runs them, and how they went."""

from .ledger import Ledger
from .record import (
    INBOUND,
    STATES,
    AttemptRecord,
    Callback,
    Claim,
    Hold,
    NewJob,
    Record,
    Taken,
    WorkerLost,
    queue_name,
)

__all__ = [
    "INBOUND",
    "STATES",
    "AttemptRecord",
    "Callback",
    "Claim",
    "Hold",
    "Ledger",
    "NewJob",
    "Record",
    "Taken",
    "WorkerLost",
    "queue_name",
]
