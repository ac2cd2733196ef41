"""What may be missing in the answers of S3 services, and of proxies in front of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ssvm_worker.errors import StoreUnavailable


def etag_in(answer: Mapping[str, Any]) -> str:
    """Return the ETag without quotes; empty where there is none."""
    return str(answer.get("ETag") or "").strip('"')


def time_in(answer: Mapping[str, Any], name: str = "LastModified") -> float:
    """Return a time in seconds since the epoch; now where there is none, so that nobody takes it for old."""
    found = answer.get(name)
    return float(found.timestamp()) if found else time.time()


def size_in(answer: Mapping[str, Any], where: str) -> int:
    """Return the size that an answer to HEAD, or an item of a list, tells; StoreUnavailable if it does not."""
    found = answer.get("ContentLength", answer.get("Size"))
    if found is None:
        what = "The store does not tell the object's size: Content-Length or Size is missing in its answer"
        raise StoreUnavailable(what, where, "Look at the service, and at what is in front of it")
    return int(found)


def whole_size(answer: Mapping[str, Any]) -> int | None:
    """Return the size of the whole object by an answer to GET, of a range or not; None if it tells none."""
    _, _, told = str(answer.get("ContentRange") or "").partition("/")
    if told.isdecimal():
        return int(told)
    return None if answer.get("ContentRange") else answer.get("ContentLength")


def version_of(answer: Mapping[str, Any]) -> str:
    """Return what tells this version of an object from others: its ETag, else its time; empty without both."""
    when = answer.get("LastModified")
    return etag_in(answer) or (when.isoformat() if when else "")
