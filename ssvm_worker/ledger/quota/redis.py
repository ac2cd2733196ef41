"""``quota.Quota`` of one broker.

<prefix>ssvm.quota:used                hash: bytes by account
<prefix>ssvm.quota:sizes:<account>     hash: bytes by "<store> <place>", so that a repeated note counts once
<prefix>ssvm.quota:held:<account>      hash: reserved bytes by job
<prefix>ssvm.quota:until:<account>     sorted set: jobs by the end of their reservations, on the broker's clock
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ssvm_worker.config.schema import LedgerSection
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.connection import BrokerClient, translated
from ssvm_worker.ledger.record import number_of

from . import AccountUsage, Grow


class SharedQuota(BrokerClient):
    """The quota that all workers share. Safe to share between threads.

    *claim_s*: seconds after which the reservation of a dead worker expires.
    """

    _NAME = "ssvm.quota:"
    _SCRIPTS = ("quota_hold", "quota_renew", "quota_release", "quota_note", "quota_usage")

    def __init__(self, url: str, *, prefix: str = "", claim_s: float = LedgerSection().claim_s) -> None:
        super().__init__(url, prefix=prefix)
        self._claim_s = claim_s

    @contextmanager
    def hold(self, account: str, job_id: str, limit: int) -> Iterator[Grow]:
        held = 0
        stop = threading.Event()

        def grow(size: int) -> None:
            nonlocal held
            ok, used, others = self._run("quota_hold", account, job_id, size, limit, self._claim_s)
            if not int(ok):
                raise AccountUsage(account, int(used), int(others)).refusal(size, limit)
            held = size

        def renew() -> None:
            while not stop.wait(self._claim_s / 4):
                with contextlib.suppress(WorkerError):  # the next renewal may succeed, and the thread must not end
                    if held:
                        self._run("quota_renew", account, job_id, held, self._claim_s)

        renewer = threading.Thread(target=renew, name="quota", daemon=True)
        renewer.start()
        try:
            yield grow
        finally:
            stop.set()
            renewer.join()
            with contextlib.suppress(WorkerError):  # the reservation expires
                self._run("quota_release", account, job_id)

    def note(self, account: str, store: str, place: str, size: int, job_id: str = "") -> None:
        self._run("quota_note", account, f"{store} {place}", size, job_id)

    def forget(self, account: str, store: str, place: str) -> None:
        self._run("quota_note", account, f"{store} {place}", "", "")

    def usage(self) -> Iterator[AccountUsage]:
        with translated(self._url):
            names: Any = self._redis.hkeys(f"{self._key}used")
            held = self._redis.scan_iter(match=f"{self._key}held:*", count=1000)
            names = {*names, *(each.removeprefix(f"{self._key}held:") for each in held)}
        for account in sorted(names):
            used, others = self._run("quota_usage", account)
            yield AccountUsage(account, number_of(used) or 0, int(others))

    def places(self, store: str) -> Iterator[tuple[str, str]]:
        with translated(self._url):
            accounts: Any = sorted(self._redis.hkeys(f"{self._key}used"))
            for account in accounts:
                for name, _ in self._redis.hscan_iter(f"{self._key}sizes:{account}", count=1000):
                    its_store, _, place = name.partition(" ")
                    if its_store == store:
                        yield account, place
