"""Records that this version would refuse, from an older version or another program, hide no other record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import redis

from ssvm_worker.cli import main
from ssvm_worker.ledger.callbacks import Callbacks, CallbackSettings
from ssvm_worker.ledger.job_metrics import JobMetrics
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.links.redis import LinkBook
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.ledger.scrub_results.redis import SharedScrubResults
from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.broker_url import redis_url
from ssvm_worker.wiring.assembly import shown
from tests.servers.broker import Broker
from tests.servers.receiver import Receiver
from tests.waiting import until

ODD: dict[str, Any] = {
    "no URL": {"request": {"url": "http://[x"}},
    "lone surrogate": {"request": {"url": "http://h/\ud800", "name": "\x9b2J\u202e"}},
    "blank in the zone": {"zone": "a b"},
    "blanks in the zone": {"zone": " a  b "},
    "unknown job": {"job": "frobnicate", "request": {"password": "SECRET"}},
    "no types": {"request": {"url": 5, "headers": [1], "mirrors": {"a": "b"}, "callback_url": ["http://u:SECRET@h/"]}},
}


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger with one good job."""
    with Ledger(broker.url, prefix=broker.prefix) as found:
        found.submit(NewJob("good", "download", "z", "download", {"url": "http://x/y"}))
        yield found


@pytest.fixture
def ssvm(broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed, and return its output."""
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)

    def run(*argv: str) -> str:
        assert main(list(argv)) == 0
        return capsys.readouterr().out

    return run


def raw(broker: Broker) -> Any:
    """Return the broker's own client."""
    return redis.Redis.from_url(redis_url(broker.url), decode_responses=True)


def look(ssvm: Callable[..., str], job_id: str) -> None:
    """Check that every command that lists or counts shows the good job and the odd one, without secrets."""
    table, rows = ssvm("jobs"), json.loads(ssvm("jobs", "--json"))
    assert {"good", job_id} <= {each["job_id"] for each in rows}
    assert "good" in table
    assert job_id in table
    for text in (table, json.dumps(rows), ssvm("job", job_id), ssvm("job", job_id, "--json"), ssvm("scale")):
        assert "SECRET" not in text
        assert not set(text) & set("\x1b\x9b\u202e\ud800")
    assert "ssvm_up 1.0" in ssvm("metrics")


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_job(ledger: Ledger, ssvm: Callable[..., str], odd: dict[str, Any]) -> None:
    """A job that no version would accept today is one line of the list."""
    values: dict[str, Any] = {"job": "download", "zone": "z", "lane": "download", "request": {}} | odd
    ledger.submit(NewJob("odd", **values))
    look(ssvm, "odd")
    claim = ledger.claim("odd", "w")
    assert claim
    ledger.finish(claim, "failed", error={"error": "TooLarge"})
    look(ssvm, "odd")


@pytest.mark.parametrize(
    "fields",
    [
        {"request": "{"},
        {"request": "[" * 100_000},
        {"request": "[]"},
        {"created": "soon"},
        {"created": "1e300", "updated": "nan"},
        {"progress": "[1]"},
        {"progress": '{"total": "x", "bytes": []}'},
        {"error": '"text"'},
        {"attempts": "2"},
        {"attempts": "x"},
    ],
)
def test_damaged_record(ledger: Ledger, broker: Broker, ssvm: Callable[..., str], fields: dict[str, str]) -> None:
    """An unreadable record is one line that says so, and what it protects stays protected."""
    ledger.submit(NewJob("odd", "download", "z", "download", {"url": "http://x/y"}, resource="template/tmpl/2/7"))
    with raw(broker) as client:
        client.hset(f"{broker.prefix}ssvm.ledger:job:odd", mapping=fields)
    look(ssvm, "odd")
    assert "template/tmpl/2/7" in ledger.live()


#: What an administrator or another program may do to the record of one job; the keys begin with the ledger's prefix.
DAMAGES: dict[str, Callable[[Any, str], Any]] = {
    "deleted": lambda client, key: client.delete(key),
    "a string": lambda client, key: (client.delete(key), client.set(key, "x")),
    "no state": lambda client, key: client.hdel(key, "state"),
    "tries": lambda client, key: client.hset(key, "tries", "x"),
    "no tries": lambda client, key: client.hdel(key, "tries"),
    "an attempt": lambda client, key: client.hset(key, "a1", "{"),
    "an attempt that is a list": lambda client, key: client.hset(key, "a1", "[]"),
    "attempts": lambda client, key: client.hset(key, "attempts", "x"),
    "attempts without end": lambda client, key: client.hset(key, "attempts", "9" * 15),
    "created": lambda client, key: client.hset(key, "created", "nan"),
    "progress": lambda client, key: client.hset(key, "progress", '{"bytes": 1e300, "moved": "x"}'),
    "priority": lambda client, key: client.hset(key, "priority", "x"),
    "error": lambda client, key: client.hset(key, mapping={"error": '{"error": {}}', "ending": "failed"}),
    "no UTF-8": lambda client, key: client.hset(key, "worker", b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_one_record_stops_nothing(broker: Broker, ssvm: Callable[..., str], damage: Callable[[Any, str], Any]) -> None:
    """A damaged or deleted record of a running or waiting job does not affect the reaper, claims and lists."""
    key = f"{broker.prefix}ssvm.ledger:job:"
    with Ledger(broker.url, prefix=broker.prefix, claim_s=0.5) as ledger, raw(broker) as client:
        for job_id in ("odd", "good", "odd-later", "good-later"):
            ledger.submit(NewJob(job_id, "download", "z", "download", {"url": "http://x/y"}))
            claim = ledger.claim(job_id, "w")
            assert claim
            if job_id.endswith("later"):
                ledger.release(claim, {"error": "StoreAway"}, 0.2, counted=True)
        ledger.reap(0.01, 5)  # the first round spares running jobs
        damage(client, f"{key}odd")
        damage(client, f"{key}odd-later")
        woken: set[str] = set()

        def good_ones() -> bool:
            woken.update(each.job_id for each in ledger.reap(0.01, 5))
            return {"good", "good-later"} <= woken

        until(good_ones, "the reaper queues the good jobs again")
        claimed = [ledger.claim_next("z", "download", "w") for _ in range(4)]
        assert {"good", "good-later"} <= {each.job_id for each in claimed if each}
        assert "good" in ssvm("jobs")
        assert "ssvm_up 1.0" in ssvm("metrics")


@pytest.mark.parametrize("text", ["x", "", "9" * 15, "x\0y", "1\0{", "2\0" * 40, b"\xff\xfe", b"3\0\xff\0"])
def test_damaged_ended_record(ledger: Ledger, broker: Broker, ssvm: Callable[..., str], text: str | bytes) -> None:
    """An unreadable record of an ended job is one line, and it expires like all others."""
    ledger.submit(NewJob("odd", "download", "z", "download", {"url": "http://x/y"}))
    ledger.cancel("odd", "ann")
    with raw(broker) as client:
        client.set(f"{broker.prefix}ssvm.ledger:ended:odd", text)
    rows = {each["job_id"]: each["state"] for each in json.loads(ssvm("jobs", "--json"))}
    assert rows["good"] == "queued"
    assert "good" in ssvm("jobs")
    assert "ssvm_up 1.0" in ssvm("metrics")
    with Ledger(broker.url, prefix=broker.prefix, keep_s=0.0) as forgetful:
        assert forgetful.expire() == 1


def test_odd_values_of_counters(ledger: Ledger, broker: Broker, ssvm: Callable[..., str]) -> None:
    """A counter that is no number, and bytes that are no text, hide no other figure and stop no job."""
    with raw(broker) as client:
        for name in ("counts", "endings", "moved"):
            odd = {"queued z download": "x", "download download z failed -": "1.5", "a b": b"\xff", b"\xff c": "1"}
            client.hset(f"{broker.prefix}ssvm.ledger:{name}", mapping=odd)  # type: ignore[arg-type]
        client.hset(f"{broker.prefix}ssvm.quota:used", mapping={"2": "x", "3": "5"})
        client.hset(f"{broker.prefix}ssvm.ledger:reaper", mapping={"last": "x", "spare": "nan"})
    assert ledger.sparing() is False
    assert ledger.reap(0.01, 5) == []
    assert "good" in ssvm("jobs")
    assert "ssvm_up 1.0" in ssvm("metrics")
    assert '"used": 5' in ssvm("quota", "--json")
    ledger.submit(NewJob("another", "download", "z", "download", {"url": "http://x/y"}))
    claim = ledger.claim("another", "w")
    assert claim
    ledger.finish(claim, "failed", error={"error": "TooLarge"})


def test_counters_with_odd_names(ledger: Ledger, broker: Broker) -> None:
    """Foreign counters do not hide the ledger's own."""
    with raw(broker) as client:
        client.hset(f"{broker.prefix}ssvm.ledger:counts", mapping={"x": 1, "queued a b c download": 2, "  ": 1})
    assert [each.job_id for each in ledger.page()] == ["good"]
    assert ledger.live() == set()
    counters = JobMetrics(broker.url, prefix=broker.prefix)
    assert {("z", "download"), ("a b c", "download")} <= {(each.zone, each.lane) for each in counters.lanes()}
    counters.close()


def test_endings_of_odd_zones(ledger: Ledger, broker: Broker) -> None:
    """Jobs that ended in a zone with blanks in its name are counted under that name."""
    ledger.submit(NewJob("odd", "download", "a b", "upload", {}))
    claim = ledger.claim("odd", "w")
    assert claim
    ledger.beat(claim, {"moved": 5})
    ledger.finish(claim, "failed", error={"error": "TooLarge"})
    counters = JobMetrics(broker.url, prefix=broker.prefix)
    assert counters.endings() == {("download", "upload", "a b", "failed", "TooLarge"): 1}
    assert counters.moved() == {("download", "a b"): 5}
    counters.close()


def test_callback_of_an_odd_job(ledger: Ledger) -> None:
    """The callback of a job with an invalid URL is sent, with the URL masked."""
    with Receiver() as receiver:
        ledger.submit(NewJob("odd", "download", "z", "download", {"url": "http://[x"}, callback_url=receiver.url))
        claim = ledger.claim("odd", "w")
        assert claim
        ledger.finish(claim, "failed", error={"error": "InvalidRequest"})
        Callbacks(ledger, CallbackSettings(rule=AddressRule(("127.0.0.0/8",))), shown).send_due()
    assert json.loads(receiver.got[0][1])["request"] == {"url": "***"}


def test_odd_worker_link_and_finding(broker: Broker) -> None:
    """An entry of another version hides no other worker, link or finding."""
    with raw(broker) as client:
        client.hset(f"{broker.prefix}ssvm.workers", mapping={"w1": "{", "w2": "[]", "w3": '{"lanes": 5}'})
        numbers = asdict(WorkerInfo("w4", "h", "z", ("download",), 1, "1", 0.0)) | {"zone": 5, "capacity": "x"}
        client.hset(f"{broker.prefix}ssvm.workers", mapping={"w4": json.dumps(numbers), "w5": b"\xff"})
        client.zadd(f"{broker.prefix}ssvm.workers:seen", {"w1": 1, "w2": 2, "w3": 3, "w4": 4, "w5": 5, b"\xff": 6})
        client.set(
            f"{broker.prefix}ssvm.links:l1", '{"id": "l1", "verb": "get", "until": "x", "store": "s", "key": "k"}'
        )
        client.zadd(f"{broker.prefix}ssvm.links", {"GET l1": 9e9})
    registry, book = WorkerRegistry(broker.url, prefix=broker.prefix), LinkBook(broker.url, prefix=broker.prefix)
    verdicts = SharedScrubResults(broker.url, prefix=broker.prefix)
    assert (registry.workers(), list(book.all()), book.find("l1")) == ([], [], None)
    verdicts.note("primary", "template/tmpl/2/7", ["is missing"], "j")
    with raw(broker) as client:
        findings = next(each for each in client.scan_iter(f"{broker.prefix}*findings"))
        client.hset(findings, "primary template/tmpl/2/6", "[]")
    assert [each.place for each in verdicts.findings()] == ["template/tmpl/2/6", "template/tmpl/2/7"]
    for each in (registry, book, verdicts):
        each.close()  # type: ignore[attr-defined]
