"""One thing that was looked at before a backup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssvm_worker.errors import SourceDenied, WorkerError

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class PreflightFinding:
    """What was looked at, how it is, and what to do."""

    check: str
    #: ok | warning | error
    state: str
    detail: str
    remedy: str = ""
    #: What an error is raised as.
    failure: type[WorkerError] = SourceDenied

    def as_dict(self) -> dict[str, Any]:
        """check, state, detail, remedy."""
        return {"check": self.check, "state": self.state, "detail": self.detail, "remedy": self.remedy}
