"""Invalid messages of all kinds: each is refused, and no worker ends or receives it again."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from ssvm_worker.ledger.record import INBOUND, NewJob
from tests.servers.http import HttpServer
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

Odd = Callable[[str], str | bytes]
REQUEST = {"account": "2", "id": "odd", "kind": "template"}


def envelope(job_id: str, body: Any = None, /, **changes: Any) -> str:
    """Return a valid message with *changes*; ``headers`` and ``properties`` are merged."""
    given = body if body is not None else json.dumps([[REQUEST | {"job_id": job_id}], {}, {}])
    message: dict[str, Any] = {
        "headers": {"lang": "go", "task": "ssvm.delete", "id": job_id, "root_id": job_id},
        "properties": {
            "delivery_tag": uuid.uuid4().hex,
            "delivery_info": {"exchange": "", "routing_key": "ssvm.z.maintenance"},
            "body_encoding": "base64",
        },
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "body": base64.b64encode(given.encode()).decode(),
    }
    for name, value in changes.items():
        key = name.replace("_", "-")
        message[key] = message[key] | value if isinstance(value, dict) else value
    return json.dumps(message)


def with_field(text: str) -> Odd:
    """Return a message with one more field, whose JSON is *text*."""
    return lambda job_id: envelope(
        job_id, f'[[{{"job_id": "{job_id}", "account": "2", "id": "odd", "more": {text}}}], {{}}, {{}}]'
    )


def with_body(text: str) -> Odd:
    """Return a message with another body."""
    return lambda job_id: envelope(job_id, text)


def nested(depth: int) -> str:
    """Return nested lists."""
    return "[" * depth + "]" * depth


#: Messages whose sender finds a failed job under the given id.
REFUSED: dict[str, Odd] = {
    "a lone surrogate": with_field('"\\ud800"'),
    "a lone surrogate in a key": with_field('{"\\udfff": 1}'),
    "a surrogate in the callback": lambda job_id: envelope(
        job_id, json.dumps([[REQUEST | {"job_id": job_id, "callback_url": "http://h/\ud800"}], {}, {}])
    ),
    "33 levels": with_field(nested(33)),
    "500 levels": with_field(nested(500)),
    "100,000 levels": with_field(nested(100_000)),
    "an object that kombu reads as bytes": with_field('{"__type__": "datetime", "__value__": 5}'),
    "257 KiB": with_field(json.dumps("x" * (257 << 10))),
    "2 MiB": with_field(json.dumps("x" * (2 << 20))),
    "a number of 5000 digits": with_field("9" * 5000),
    "no number": with_field("NaN"),
    "arguments that are null": with_body("[null, {}, {}]"),
    "keyword arguments that are a number": with_body("[[{}], 5, {}]"),
    "keyword arguments": with_body('[[{}], {"self": 1, "": 2}, {}]'),
    "a body that is a number": with_body("5"),
    "a body that is null": with_body("null"),
    "a body that is a string": with_body('"abc"'),
    "a body that is empty": with_body("[]"),
    "a body that is not JSON": with_body("[["),
    "a body in bytes": lambda job_id: envelope(job_id, body="//4A"),
    "a body that is not base64": lambda job_id: envelope(job_id, body="!"),
    "a body that is no text": lambda job_id: envelope(job_id, body=5),
    "an encoding of the body that there is not": lambda job_id: envelope(job_id, properties={"body_encoding": "zz"}),
    "no content type": lambda job_id: envelope(job_id, content_type=None),
    "pickle": lambda job_id: envelope(job_id, content_type="application/x-python-serialize"),
    "a task that there is not": lambda job_id: envelope(job_id, headers={"task": "ssvm.downlaod"}),
    "a task of Celery's own": lambda job_id: envelope(job_id, headers={"task": "celery.starmap"}),
    "a task that is a list": lambda job_id: envelope(job_id, headers={"task": ["ssvm.delete"]}),
    "no task": lambda job_id: envelope(job_id, headers={"task": None}),
    "no delivery tag": lambda job_id: envelope(job_id, properties={"delivery_tag": None}),
    "no place": lambda job_id: envelope(job_id, properties={"delivery_info": []}),
    "no properties": lambda job_id: envelope(job_id, properties=None),
}
#: Messages with properties that Celery would obey and a job does not need: their jobs run.
HARMLESS: dict[str, Odd] = {
    name: (lambda job_id, headers=headers: envelope(job_id, headers=headers))
    for name, headers in {
        "timelimit": {"timelimit": "zz"},
        "stamps": {"stamps": 5, "stamped_headers": 5, "group": 5},
        "retries": {"retries": "x"},
        "eta": {"eta": ["x"]},
        "a late eta": {"eta": "9999-12-31T23:59:59+00:00"},
        "expires": {"expires": "2001-01-01T00:00:00+00:00"},
        "shadow": {"shadow": [1]},
        "compression": {"compression": "zz"},
        "deep headers": {"more": json.loads(nested(400))},
    }.items()
}
#: Messages without an id.
NAMELESS: dict[str, Odd] = {
    name: (lambda _, text=text: text)
    for name, text in {
        "no JSON": "hello",
        "nothing": "",
        "a list": "[]",
        "a number": "5",
        "an object": "{}",
        "no text": b"\xff\xfe\x00",
        "deep": nested(100_000),
        "large": json.dumps({"x": "y" * (2 << 20)}),
        "a round of the reaper with arguments": envelope("", "[[1], {}, {}]", headers={"task": "ssvm.reap"}),
        "a round of the reaper with names": envelope("", '[[], {"self": 1}, {}]', headers={"task": "ssvm.reap"}),
        "a retry with names": envelope("", '[["x"], {"self": 1}, {}]', headers={"task": "ssvm.retry"}),
    }.items()
}


def is_taken(site: Site) -> bool:
    """Return whether no message waits or is unacknowledged."""
    with site.broker.client() as client:
        return not site.waiting("maintenance") and not client.hlen(f"{site.broker.prefix}unacked")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(worker_site: Site, name: str) -> None:
    """An invalid message is a failed job under its id, and the worker continues."""
    job_id = f"odd-{uuid.uuid4().hex[:8]}"
    worker_site.push("maintenance", REFUSED[name](job_id))
    record = worker_site.wait(job_id)
    assert (record.state, record.attempts) == ("failed", ())
    assert record.error
    assert record.error["error"] == "InvalidRequest"
    assert "bug" not in record.error["message"]
    worker_site.until(lambda: is_taken(worker_site), "the message is gone")
    assert worker_site.workers[0].process.poll() is None
    assert "Traceback" not in worker_site.workers[0].log.read_text()


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(worker_site: Site, name: str) -> None:
    """Celery's other properties, such as times and limits, are ignored."""
    job_id = f"odd-{uuid.uuid4().hex[:8]}"
    worker_site.push("maintenance", HARMLESS[name](job_id))
    assert worker_site.wait(job_id).state == "succeeded"


@pytest.mark.parametrize("name", NAMELESS)
def test_nameless(worker_site: Site, name: str) -> None:
    """An unreadable message is dropped, and the next one is processed."""
    worker_site.push("maintenance", NAMELESS[name](""))
    job_id = f"odd-{uuid.uuid4().hex[:8]}"
    worker_site.push("maintenance", envelope(job_id))
    assert worker_site.wait(job_id).state == "succeeded"
    worker_site.until(lambda: is_taken(worker_site), "the message is gone")
    assert "Traceback" not in worker_site.workers[0].log.read_text()


def test_job_of_another_version(worker_site: Site) -> None:
    """A job that this version does not have fails at its first attempt, for any wake-up message."""
    site, log = worker_site, worker_site.workers[0].log
    for job_id, wake in (("newer-1", "ssvm.frobnicate"), ("newer-2", "ssvm.delete")):
        site.push("maintenance", envelope(job_id, headers={"task": "ssvm.frobnicate"}))
        assert site.wait(job_id).attempts == ()
        site.ledger.retry(job_id, "the test")
        body = json.dumps([[{"job_id": job_id}], {}, {}])
        site.push("maintenance", envelope(job_id, body, headers={"task": wake}))
        site.until(lambda each=job_id: bool(site.ledger.get(each).attempts), "the job is tried")  # type: ignore[misc]
        record = site.wait(job_id)
        assert (record.state, len(record.attempts), (record.error or {})["error"]) == ("failed", 1, "InvalidRequest")
    assert "Traceback" not in log.read_text()


def test_little_is_kept(worker_site: Site) -> None:
    """A refused request keeps its valid fields, and the names of the others."""
    given = {"job_id": "odd-kept", "account": "2", "id": "x", "passwrod": "SECRET", "stores": 5}
    worker_site.send("delete", given, "odd-kept")
    masked = {"passwrod": "***", "stores": "***"}
    assert worker_site.wait("odd-kept").request == {"job_id": "odd-kept", "account": "2", "id": "x"} | masked


def test_a_control_message(worker_site: Site) -> None:
    """A broadcast that is not Celery's is dropped too."""
    with worker_site.broker.client() as client:
        for text in ("[]", "5", "hello", '{"body": 5}', '{"properties": {}}'):
            client.publish(f"{worker_site.broker.prefix}/0.celery.pidbox", text)
    worker_site.push("maintenance", envelope("odd-after-control"))
    assert worker_site.wait("odd-after-control").state == "succeeded"


@pytest.mark.parametrize("form", ["arguments", "header"])
def test_forged_claim(make_site: Callable[..., Site], http_server: HttpServer, form: str) -> None:
    """A foreign message with a running attempt's token does not run it again."""
    site = make_site(worker={"concurrency": 2})
    url = http_server.serve("slow.raw", bytes(4 << 20), stall_after=1 << 20)
    site.start()
    site.submit("download", url=url, account="1", id="t1", format="raw", job_id="held")
    site.until(lambda: bool(http_server.requests), "the attempt reads")
    request = {"job_id": "held", "token": 1} if form == "arguments" else {"job_id": "held"}
    headers = {"ssvm_claim": ["held", 1], "claim": ["held", 1]} if form == "header" else {}
    for number in range(2):
        site.send("download", request, f"forged-{number}", headers=headers)
    site.send("delete", REQUEST | {"job_id": "after"}, "after")
    site.wait("after")
    site.until(lambda: site.waiting("download") == 0, "the forged messages are taken")
    site.ledger.cancel("held", "the test")
    assert site.wait("held").state == "cancelled"
    assert len(http_server.requests) == 1


def test_by_another_way(site: Site) -> None:
    """A message cannot run a job of another zone, or an upload that waits for its sender."""
    for job_id, zone, lane in (("elsewhere", "z2", "maintenance"), ("waits", "z", INBOUND)):
        site.ledger.submit(NewJob(job_id, "delete", zone, lane, REQUEST | {"job_id": job_id}))
    site.start()
    for job_id in ("elsewhere", "waits"):
        site.send("delete", {"job_id": job_id}, job_id, headers={"eta": "2001-01-01T00:00:00+00:00"})
    site.send("delete", REQUEST | {"job_id": "last"}, "last")
    assert site.wait("last").state == "succeeded"
    assert {site.ledger.get(each).state for each in ("elsewhere", "waits")} == {"queued"}
