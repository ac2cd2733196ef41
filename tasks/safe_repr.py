"""Hide the arguments of a message, which may contain a presigned URL, and show only the id of its job."""

from __future__ import annotations

import re
from typing import Any

from celery.worker.request import Request

from ssvm_worker.runner.messages import Message

#: The arguments of a wake-up message, as Celery writes them. All other messages are shown in this form too.
_WAKEUP = re.compile(r"\[\{'job_id': '([A-Za-z0-9._-]{1,128})'\}\]")


def job_of(shown: str) -> str:
    """Return the job id in the shown arguments of a message, or "" if they contain none."""
    found = _WAKEUP.fullmatch(shown)
    return found[1] if found else ""


class SafeRequest(Request):  # type: ignore[misc]
    """Celery's request without its arguments, for the log, events, ``celery inspect`` and Flower.

    A sender puts the text of its arguments into a header (``argsrepr``), and Celery copies that into events.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        job_id = "" if self.name == "ssvm.reap" else Message(self.name, self._args, {}, self.id).job_id
        shown = f"[{{'job_id': '{job_id}'}}]"
        self._argsrepr = shown if _WAKEUP.fullmatch(shown) else "[…]"
        self._kwargsrepr = "{}"
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - Celery's signature
        """Return the safe form for ``celery inspect``, always."""
        return super().info(safe=True)  # type: ignore[no-any-return]
