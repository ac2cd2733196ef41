"""The rules of a listing that every store shares."""

from __future__ import annotations

import heapq
import marshal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import IO

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.streaming.interfaces import StoredObject

#: Objects that are sorted in memory: some 10 MiB.
_RUN = 25_000


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


def in_order(objects: Iterable[StoredObject]) -> Iterator[StoredObject]:
    """The objects by key, whatever their order. Holds 25,000 of them; more are sorted in files without a name."""
    given = iter(objects)
    run = _sorted(given)
    if len(run) < _RUN:
        yield from (StoredObject(key, size, modified=modified) for key, size, modified in run)
        return
    with ExitStack() as stack:
        runs = []
        while run:
            runs.append(_kept(run, stack.enter_context(tempfile.TemporaryFile())))
            run = _sorted(given)
        for key, size, modified in heapq.merge(*runs):
            yield StoredObject(key, size, modified=modified)


_Seen = tuple[str, int, float]


def _sorted(given: Iterator[StoredObject]) -> list[_Seen]:
    return sorted((each.key, each.size, each.modified) for each in islice(given, _RUN))


def _kept(run: list[_Seen], file: IO[bytes]) -> Iterator[_Seen]:
    for each in run:
        marshal.dump(each, file)
    file.seek(0)
    return (marshal.load(file) for _ in range(len(run)))  # noqa: S302 - our own, from a file that nobody else has
