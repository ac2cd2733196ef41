"""The filters of the page of jobs: which values of a URL are valid, and which jobs they select."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest, StoreFull
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from tasks.flower.job_list import JobQuery, list_jobs
from tasks.flower.job_view import details
from tests.servers.broker import Broker


@pytest.fixture
def settings(broker: Broker) -> Settings:
    """Return settings with the test's broker."""
    return parse({"broker": {"url": broker.url, "prefix": broker.prefix}}, "the test")


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger with 60 queued jobs and a failed one."""
    with Ledger(broker.url, prefix=broker.prefix) as ledger:
        for number in range(60):
            put(ledger, f"job-{number:02}", str(number % 3))
        put(ledger, "broken", "9")
        claim = ledger.claim("broken", "worker-7")
        assert claim
        error = StoreFull("Full", "primary", "Free space").as_dict()
        ledger.finish(claim, "failed", error=error, result={"owed": {"archive": error | {"copy_job": "copy-1"}}})
        yield ledger


def put(ledger: Ledger, job_id: str, account: str) -> None:
    """Submit a download."""
    request = {"url": f"http://x/{job_id}?key=s3cret", "account": account, "id": job_id, "job_id": job_id}
    ledger.submit(NewJob(job_id, job="download", zone="z", lane="download", request=request, account=account))


def ids(ledger: Ledger, settings: Settings, **given: str) -> list[str]:
    """Return the ids of a page."""
    return [each.job_id for each in list_jobs(ledger, settings, JobQuery.parse(given))["jobs"]]


def test_pages(ledger: Ledger, settings: Settings) -> None:
    """A page has 50 jobs, the newest first, and the next page has the others."""
    assert ids(ledger, settings, page="1")[:2] == ["broken", "job-59"]
    assert ids(ledger, settings, page="2") == [f"job-{number:02}" for number in range(10, -1, -1)]
    assert ids(ledger, settings, page="3") == []


def test_sorting(ledger: Ledger, settings: Settings) -> None:
    """A column sorts all jobs that match, in both directions."""
    assert ids(ledger, settings, sort="id")[:2] == ["broken", "job-00"]
    assert ids(ledger, settings, sort="-id")[:2] == ["job-59", "job-58"]
    assert ids(ledger, settings, sort="-account")[0] == "broken"


@pytest.mark.parametrize(
    ("given", "count"),
    [({"account": "1"}, 20), ({"error": "StoreFull"}, 1), ({"q": "WORKER-7"}, 1), ({"q": "job-5"}, 10),
     ({"q": "s3cret"}, 0), ({"state": "failed", "zone": "y"}, 0), ({"since": "1h", "state": "failed"}, 1),
     ({"until": "1h"}, 0), ({"lane": "upload"}, 0)],
)  # fmt: skip
def test_filters(ledger: Ledger, settings: Settings, given: dict[str, str], count: int) -> None:
    """Filters and the search select jobs, and the search never examines secrets."""
    assert len(ids(ledger, settings, **given)) == count


@pytest.mark.parametrize(
    "given",
    [{"state": "lost"}, {"sort": "secret"}, {"page": "0"}, {"page": "²"}, {"page": "9" * 30}, {"since": "soon"}],
)
def test_invalid(given: dict[str, str]) -> None:
    """A value that is not possible is an error that lists the possible ones."""
    with pytest.raises(InvalidRequest) as caught:
        JobQuery.parse(given)
    assert caught.value.remedy


def test_links_keep_filters() -> None:
    """A link to another order or state keeps the other filters, and begins with page 1."""
    query = JobQuery.parse({"account": "a&b", "page": "4", "sort": "id", "unknown": "1"})
    assert (
        query.link(page="5") == "?account=a%26b&page=5&sort=id"
        or query.link(page="5") == "?account=a%26b&sort=id&page=5"
    )
    assert query.sort_link("id") == "?account=a%26b&sort=-id"
    assert query.link(state="failed", sort="") == "?account=a%26b&state=failed"


def test_details(ledger: Ledger, settings: Settings) -> None:
    """The page of a failed job has the missing store with its copy job, the attempts and the history."""
    view = details(ledger.get("broken"), settings)
    assert view.missing == [("archive", "StoreFull: Full", "copy-1")]
    assert [each["worker"] for each in view.attempts] == ["worker-7"]
    assert next(text for _, text in view.history) == "Submitted"
    assert "s3cret" not in view.request
    waiting = details(ledger.get("job-01"), settings)
    assert (waiting.why, waiting.verb) == ("no worker of zone z is up", "cancel")
    claim = ledger.claim("job-02", "worker-7")
    assert claim
    ledger.release(claim, error=StoreFull("Full", "primary", "Free space").as_dict())
    assert details(ledger.get("job-02"), settings).why == "no worker of zone z is up"
