"""Rules for listings that all stores share."""

from __future__ import annotations

import heapq
import marshal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from typing import IO

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.streaming.interfaces import StoredObject

#: The number of objects to sort in memory: about 10 MiB.
_RUN = 25_000
#: Objects that are written and read at once. One block of each run is in memory.
_BLOCK = 100


def check_prefix(prefix: str) -> str:
    """Return the prefix without slashes around it, after a check by the rules of keys.

    An empty prefix means the whole store.
    """
    prefix = prefix.strip("/")
    return check_key(prefix) if prefix else ""


def below(prefix: str) -> str:
    """Return the start of all keys below a prefix. A prefix is a complete path component."""
    prefix = check_prefix(prefix)
    return f"{prefix}/" if prefix else ""


def is_key(path: str) -> bool:
    """Return whether the path is a valid key. Listings omit other paths, because the worker did not write them."""
    return passes(check_key, path)


def passes(check: Callable[[str], str], path: str) -> bool:
    """Return whether the path satisfies a rule of keys."""
    try:
        return bool(check(path))
    except InvalidRequest:
        return False


def in_order(objects: Iterable[StoredObject]) -> Iterator[StoredObject]:
    """Sort objects by key. The function holds 25,000 objects, and sorts more in unnamed temporary files."""
    given = iter(objects)
    run = _sorted(given)
    if len(run) < _RUN:
        yield from (StoredObject(key, size, modified=modified) for key, size, modified in run)
        return
    with ExitStack() as stack:
        runs = []
        while run:
            runs.append(_saved(run, stack.enter_context(tempfile.TemporaryFile())))
            run = _sorted(given)
        for key, size, modified in heapq.merge(*runs):
            yield StoredObject(key, size, modified=modified)


_Row = tuple[str, int, float]


def _sorted(given: Iterator[StoredObject]) -> list[_Row]:
    return sorted((each.key, each.size, each.modified) for each in islice(given, _RUN))


def _saved(run: list[_Row], file: IO[bytes]) -> Iterator[_Row]:
    """Write a run to a file, and return an iterator that reads the run again."""
    starts = range(0, len(run), _BLOCK)
    for start in starts:
        marshal.dump(run[start : start + _BLOCK], file)
    file.seek(0)
    return chain.from_iterable(marshal.load(file) for _ in starts)  # noqa: S302 - only this process can write the file
