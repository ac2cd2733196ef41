"""The result of one check of ``ssvm doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    #: The result, or the problem and its remedy.
    detail: str
    #: The dependency works, but not as it should.
    warning: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON: check, ok, state (ok | warning | failed), detail."""
        state = "failed" if not self.ok else "warning" if self.warning else "ok"
        return {"check": self.check, "ok": self.ok, "state": state, "detail": self.detail}
