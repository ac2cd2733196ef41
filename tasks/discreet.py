"""What a worker tells others of a message: never the arguments, which may hold a presigned URL."""

from __future__ import annotations

import re
from typing import Any

from celery.worker.request import Request

#: How Celery writes the arguments of our own doorbell.
_DOORBELL = re.compile(r"\[\{'job_id': '[A-Za-z0-9._-]{1,128}'\}\]")


class DiscreetRequest(Request):  # type: ignore[misc]
    """Celery's request, as events, ``celery inspect`` and Flower may see it.

    A sender writes its arguments' text into a header (``argsrepr``), and Celery passes it on in events.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        told = self._request_dict.get("argsrepr") or ""
        self._argsrepr = told if _DOORBELL.fullmatch(told) else "[…]"
        self._kwargsrepr = "{}"
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - there is nothing else to tell
        """For ``celery inspect``: the safe form always."""
        return super().info(safe=True)  # type: ignore[no-any-return]
