"""The rules of a listing that every store shares."""

from __future__ import annotations

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.keys import check_key


def check_prefix(prefix: str) -> str:
    """The prefix without slashes around it; it obeys the rules of keys, or is empty for the whole store."""
    prefix = prefix.strip("/")
    return check_key(prefix) if prefix else ""


def below(prefix: str) -> str:
    """What the keys below a prefix begin with: whole components only."""
    prefix = check_prefix(prefix)
    return f"{prefix}/" if prefix else ""


def is_key(path: str) -> bool:
    """Whether one of our objects may lie at that path; else it is somebody else's, and is not listed."""
    try:
        return bool(check_key(path))
    except InvalidRequest:
        return False
