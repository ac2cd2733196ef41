"""What a worker takes of a message, before Celery looks at it: the task, its id, its arguments, and a trace.

All else that a sender may write is left out. Times (``eta``, ``expires``) pass by the ledger. A job has no use for
Celery's limits, stamps, chains and retries. The claim is given to a message by the main process alone.
"""

from __future__ import annotations

import json
from typing import Any

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs.request import MAX_BYTES, check_form

#: The header by which the main process hands a claim to a pool process: [job id, token].
CLAIM = "ssvm_claim"
_REMEDY = "Send protocol 2 of Celery, with a JSON body: docs/jobs.md"


def screen(message: Any) -> None:
    """Make it a message of protocol 2 with what a job needs; InvalidRequest says why that cannot be done."""
    if message.problem:
        raise InvalidRequest(message.problem, "", _REMEDY)
    headers = message.headers
    payload = _payload(message)
    if isinstance(payload, dict):  # protocol 1, which has all in the body
        headers, payload = payload, [payload.get("args"), payload.get("kwargs", {}), {}]
    if not isinstance(payload, list) or len(payload) != 3:
        raise InvalidRequest("The body is not a list of arguments, keyword arguments and options", "", _REMEDY)
    args, kwargs = payload[:2]
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise InvalidRequest("The arguments are not a list, or the keyword arguments not an object", "", _REMEDY)
    task, task_id = headers.get("task"), headers.get("id")
    if not isinstance(task, str) or not isinstance(task_id, str):
        raise InvalidRequest("The message has no task and id that are strings", "", _REMEDY)
    check_form([args, kwargs, task, task_id], "the message")
    names = ("traceparent", "root_id", "expires") if task == "ssvm.reap" else ("traceparent", "root_id")  # of beat
    kept = {name: text for name in names if isinstance(text := headers.get(name), str)}
    message.headers = {"lang": "py", "task": task, "id": task_id, **kept}
    message.content_type, message.content_encoding = "application/json", "utf-8"
    message.body = json.dumps([args, kwargs, {}])


def first_argument(message: Any) -> dict[str, Any]:
    """Return the request object of a message that may be wrong in any way, as far as there is one."""
    try:
        first = _payload(message)[0][0]
    except (InvalidRequest, LookupError, TypeError):
        return {}
    return first if isinstance(first, dict) else {}


def _payload(message: Any) -> Any:
    if message.content_type != "application/json":
        raise InvalidRequest(f"The content type is {message.content_type!r:.100}, not application/json", "", _REMEDY)
    if len(message.body or "") > MAX_BYTES:
        what = f"The message has {len(message.body)} bytes; {MAX_BYTES} are allowed"
        raise InvalidRequest(what, "", "Leave out what no job needs")
    try:
        return json.loads(message.body or "")
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not JSON: {error}", "", _REMEDY) from None
