"""The queues under any order of events, compared with a model of the rules."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Claim, NewJob
from tests.servers.broker import Broker

LIMITS = {"store": 2, "source": 1, "account": 3}


class Machine(RuleBasedStateMachine):
    """Any order of submits, claims, ends, delays, losses and cancels, compared with a model of the rules."""

    broker: Broker
    number = 0

    def __init__(self) -> None:
        super().__init__()
        Machine.number += 1
        self.prefix = f"{self.broker.prefix}{Machine.number}:"
        self.ledger = Ledger(self.broker.url, prefix=self.prefix, claim_s=1000, limits=LIMITS)
        self.count = 0
        self.jobs: dict[str, NewJob] = {}
        self.running: dict[str, NewJob] = {}

    taken = Bundle("taken")

    @rule(
        account=st.sampled_from("abc"),
        priority=st.integers(0, 2),
        store=st.sampled_from(["", "s", "t"]),
        source=st.sampled_from(["", "h"]),
        resource=st.sampled_from(["", "", "r1"]),
    )
    def submit(self, account: str, priority: int, store: str, source: str, resource: str) -> None:
        named = {"account": account, "store": store and f"z/{store}", "source": source}
        uses = tuple(f"{kind}:{name}" for kind, name in named.items() if name)
        self.count += 1
        job_id = f"j{self.count:03}"
        job = NewJob(job_id, "download", "z", "download", {}, resource, priority=priority, account=account, uses=uses)
        self.jobs[job.job_id] = job
        self.ledger.submit(job)

    @rule(target=taken)
    def claim(self) -> Any:
        could = [each for each in self.waiting() if self.fits(each)]
        taken = self.ledger.claim_next("z", "download", "w")
        if taken is None and could:  # it was woken instead of another job; the reaper's next round corrects that
            self.ledger.reap(0.0, 1000)
            taken = self.ledger.claim_next("z", "download", "w")
        assert bool(taken) == bool(could)
        if taken is None:
            return None
        job = self.jobs[taken.job_id]
        assert self.fits(job)
        self.running[taken.job_id] = job
        return taken

    @rule(taken=consumes(taken), how=st.sampled_from(["succeeded", "again", "later"]))
    def end(self, taken: Any, how: str) -> None:
        if taken is None or taken.job_id not in self.running:
            return
        claim = self.ledger.begin(taken.job_id, taken.token)
        assert claim
        del self.running[taken.job_id]
        if how == "succeeded":
            self.ledger.finish(claim, "succeeded", result={})
            del self.jobs[taken.job_id]
        else:
            self.ledger.release(claim, None, delay_s=1000.0 if how == "later" else 0.0)
            if how == "later":
                del self.jobs[taken.job_id]

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        fresh = [each.job_id for each in self.waiting() if not self.ledger.get(each.job_id).attempts]
        if fresh:
            job_id = data.draw(st.sampled_from(fresh))
            self.ledger.cancel(job_id, "ann")
            del self.jobs[job_id]

    @rule()
    def reap(self) -> None:
        self.ledger.reap(0.0, 1000)

    def waiting(self) -> list[NewJob]:
        return [each for job_id, each in self.jobs.items() if job_id not in self.running]

    def fits(self, job: NewJob) -> bool:
        """Return whether no limit prevents the job."""
        used = Counter(limit for each in self.running.values() for limit in each.uses)
        if job.resource and job.resource in {each.resource for each in self.running.values()}:
            return False
        return all(used[limit] < LIMITS[limit.partition(":")[0]] for limit in job.uses)

    @invariant()
    def states(self) -> None:
        counts = self.ledger.counts()
        assert counts["running"] == len(self.running)

    def teardown(self) -> None:
        """Run all waiting jobs to their end."""
        for job_id in list(self.running):
            record = self.ledger.get(job_id)
            self.ledger.finish(Claim(job_id, len(record.attempts), record), "succeeded", result={})
            del self.jobs[job_id]
        rounds = 0
        while self.jobs:
            taken = self.ledger.claim_next("z", "download", "w")
            if taken is None:
                rounds += 1
                assert rounds < 100, self.jobs
                self.ledger.reap(0.0, 1000)
                continue
            claim = self.ledger.begin(taken.job_id, taken.token)
            assert claim
            self.ledger.finish(claim, "succeeded", result={})
            del self.jobs[taken.job_id]
        self.ledger.close()


def test_any_order(broker: Broker) -> None:
    """No limit is ever exceeded, no runnable job is forgotten, and all jobs run in the end."""
    Machine.broker = broker
    check = settings(
        max_examples=12,
        stateful_step_count=40,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    run_state_machine_as_test(Machine, settings=check)
