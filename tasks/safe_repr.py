"""What a worker tells others of a message: never the arguments, which may hold a presigned URL, but whose job it is."""

from __future__ import annotations

import re
from typing import Any

from celery.worker.request import Request

from ssvm_worker.runner.messages import Message

#: How Celery writes the arguments of our own doorbell, and what all others are shown as.
_DOORBELL = re.compile(r"\[\{'job_id': '([A-Za-z0-9._-]{1,128})'\}\]")


def job_of(shown: str) -> str:
    """The job in the arguments of a message, as they are shown; "" if it is about none."""
    found = _DOORBELL.fullmatch(shown)
    return found[1] if found else ""


class SafeRequest(Request):  # type: ignore[misc]
    """Celery's request, as the log, events, ``celery inspect`` and Flower may see it.

    A sender writes its arguments' text into a header (``argsrepr``), and Celery passes it on in events.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        job_id = "" if self.name == "ssvm.reap" else Message(self.name, self._args, {}, self.id).job_id
        shown = f"[{{'job_id': '{job_id}'}}]"
        self._argsrepr = shown if _DOORBELL.fullmatch(shown) else "[…]"
        self._kwargsrepr = "{}"
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - there is nothing else to tell
        """For ``celery inspect``: the safe form always."""
        return super().info(safe=True)  # type: ignore[no-any-return]
