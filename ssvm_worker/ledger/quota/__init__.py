"""Quotas: the bytes that each account has stored, and the bytes that running jobs reserve. Here: for one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ssvm_worker.errors import QuotaExceeded
from ssvm_worker.units import MiB, human_size

#: Reserves a total number of bytes, which replaces the previous reservation. QuotaExceeded keeps the previous one.
Grow = Callable[[int], None]
#: Bytes reserved ahead of a stream of unknown length. A larger step asks the broker less often.
_STEP = 64 * MiB


class Held:
    """The bytes that one job reserves of its account's quota. Safe to share between threads."""

    def __init__(self, grow: Grow | None, copies: int) -> None:
        self._grow = grow
        self._copies = copies
        self._taken = self._reserved = 0
        self._lock = threading.Lock()

    @property
    def is_limited(self) -> bool:
        """Return whether the account has a limit."""
        return self._grow is not None

    def expect(self, size: int | None) -> None:
        """Reserve *size* bytes on each store. Raise QuotaExceeded if that is too much. None: unknown size."""
        with self._lock:
            if self._grow and (size or 0) * self._copies > self._reserved:
                self._reserve((size or 0) * self._copies)

    def took(self, chunk: bytes) -> None:
        """Count a stored chunk, as an observer of the stream. Raise QuotaExceeded at the limit."""
        self.add(len(chunk))

    def add(self, size: int) -> None:
        """Count bytes that were stored on each store. Raise QuotaExceeded at the limit."""
        with self._lock:
            self._taken += size * self._copies
            if not self._grow or self._taken <= self._reserved:
                return
            try:
                self._reserve(self._taken + _STEP * self._copies)
            except QuotaExceeded:
                self._reserve(self._taken)

    def reserve_again(self) -> None:
        """Reserve the counted bytes again after a change of the usage. Raise QuotaExceeded at the limit."""
        with self._lock:
            if self._grow:
                self._reserve(self._taken)

    def part(self) -> StreamQuota:
        """Return the counter of one of several streams. A stream may start again."""
        return StreamQuota(self)

    def restart(self) -> None:
        """Forget the counted bytes: nothing was stored, and the job starts again."""
        with self._lock:
            self._taken = 0

    def _reserve(self, size: int) -> None:
        assert self._grow
        self._grow(size)
        self._reserved = size


class StreamQuota:
    """The bytes of one of several streams."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._size = 0

    def took(self, chunk: bytes) -> None:
        """Count a stored chunk, as an observer of the stream."""
        self._size += len(chunk)
        self._held.add(len(chunk))

    def take_back(self) -> None:
        """Forget the counted bytes: the stream failed, and starts again."""
        self._held.add(-self._size)
        self._size = 0


#: For jobs without a limit.
UNLIMITED = Held(None, 1)


@dataclass(frozen=True)
class AccountUsage:
    """The usage of one account, in bytes."""

    account: str
    #: Size of its artifacts on all stores.
    used: int = 0
    #: Bytes that running jobs may still add.
    reserved: int = 0

    def to_dict(self, limit: int | None) -> dict[str, Any]:
        """Return the public JSON."""
        free = None if limit is None else max(0, limit - self.used - self.reserved)
        return {"account": self.account, "used": self.used, "reserved": self.reserved, "limit": limit, "free": free}

    def refusal(self, size: int, limit: int) -> QuotaExceeded:
        """Return the error for a job that needs *size* bytes more than the limit allows."""
        held = f" and other jobs hold {human_size(self.reserved)} ({self.reserved} bytes)" if self.reserved else ""
        what = (
            f"The quota of account {self.account} is {human_size(limit)} ({limit} bytes): it has used "
            f"{human_size(self.used)} ({self.used} bytes){held}, and this needs {human_size(size)} ({size} bytes)"
        )
        return QuotaExceeded(what, self.account, "Delete what it no longer needs, or raise its limit: `ssvm quota`")


class Quota(Protocol):
    """The usage of all accounts. Each method raises StoreUnavailable while the broker is away."""

    def hold(self, account: str, job_id: str, limit: int) -> AbstractContextManager[Grow]:
        """Let a job reserve bytes of the account while the block runs. A dead worker's reservation expires."""

    def note(self, account: str, store: str, place: str, size: int, job_id: str = "") -> None:
        """Store the size of an artifact. The job's reservation shrinks by the added bytes. Safe to repeat."""

    def forget(self, account: str, store: str, place: str) -> None:
        """Remove a deleted artifact. Safe to repeat."""

    def usage(self) -> Iterator[AccountUsage]:
        """Yield every account that has, or had, artifacts or reservations, by name."""

    def places(self, store: str) -> Iterator[tuple[str, str]]:
        """Yield account and prefix of all counted artifacts of a store."""


class LocalQuota:
    """The usage in the memory of this process."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, str, str], int] = {}
        self._held: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, account: str, job_id: str, limit: int) -> Iterator[Grow]:
        def grow(size: int) -> None:
            with self._lock:
                known = self._usage(account, job_id)
                if known.used + known.reserved + size > limit:
                    raise known.refusal(size, limit)
                self._held[account, job_id] = size

        try:
            yield grow
        finally:
            self._held.pop((account, job_id), None)

    def note(self, account: str, store: str, place: str, size: int, job_id: str = "") -> None:
        with self._lock:
            added = size - self._sizes.get((account, store, place), 0)
            self._sizes[account, store, place] = size
            if (account, job_id) in self._held:
                self._held[account, job_id] = max(0, self._held[account, job_id] - added)

    def forget(self, account: str, store: str, place: str) -> None:
        with self._lock:
            self._sizes.pop((account, store, place), None)

    def usage(self) -> Iterator[AccountUsage]:
        with self._lock:
            names = {account for account, *_ in (*self._sizes, *self._held)}
            return iter([self._usage(each) for each in sorted(names)])

    def places(self, store: str) -> Iterator[tuple[str, str]]:
        return iter([(account, place) for account, its_store, place in sorted(self._sizes) if its_store == store])

    def _usage(self, account: str, except_job: str = "") -> AccountUsage:
        used = sum(size for (owner, *_), size in self._sizes.items() if owner == account)
        held = sum(size for (owner, job_id), size in self._held.items() if owner == account and job_id != except_job)
        return AccountUsage(account, used, held)
