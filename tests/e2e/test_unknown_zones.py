"""A zone without workers: its messages become jobs, and these fail with a reason, or run once a worker starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.test_odd_messages import envelope
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e


def test_unknown_zone(make_site: Callable[..., Site]) -> None:
    """Messages and jobs for a mistyped zone fail, with the similar zone as a hint, and may be retried."""
    site = make_site(ledger={"unknown_zone_s": 0.3})
    site.start()
    with site.broker.client() as client:
        for job_id, changes in {"m1": {}, "m2": {"headers": {"task": "ssvm.downlaod"}}, "m3": {"body": "!"}}.items():
            client.lpush(f"{site.broker.prefix}ssvm.zz.maintenance", envelope(job_id, **changes))
    other = make_site(on=site.broker, zone="zz")
    other.submit("delete", job_id="m4", account="2", id="x")
    found = {job_id: site.wait(job_id, "failed") for job_id in ("m1", "m2", "m3", "m4")}
    assert {each.zone for each in found.values()} == {"zz"}
    problems = {job_id: (each.error or {})["what"] for job_id, each in found.items()}
    assert problems["m1"] == problems["m4"] == "No worker serves zone zz, did you mean z"
    assert "downlaod" in problems["m2"]
    assert "not JSON" in problems["m3"]
    assert other.ledger.retry("m1", "test").state == "queued"
