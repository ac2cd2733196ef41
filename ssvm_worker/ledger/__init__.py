"""Which jobs there are, who runs them, and how they went."""

from .ledger import Ledger
from .record import (
    INBOUND,
    STATES,
    AttemptRecord,
    Callback,
    Claim,
    ClaimedJob,
    InlineClaim,
    NewJob,
    Record,
    WorkerLost,
    queue_name,
)

__all__ = [
    "INBOUND",
    "STATES",
    "AttemptRecord",
    "Callback",
    "Claim",
    "ClaimedJob",
    "InlineClaim",
    "Ledger",
    "NewJob",
    "Record",
    "WorkerLost",
    "queue_name",
]
