"""Attempts are traced to a real OTLP receiver: a span each, with its stages below, in the sender's trace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from ssvm_worker.client import Client
from tests import images
from tests.neighbours import free_port
from tests.servers.collector import Collector, Span
from tests.servers.http import Behaviour, HttpServer
from tests.servers.worker import Site, until

pytestmark = pytest.mark.e2e
DISK = images.mbr(1 << 20)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


def ended(collector: Collector, job_id: str, attempts: int) -> list[Span]:
    """Return the attempts' spans, as soon as so many have arrived."""

    def found() -> list[Span]:
        return [each for each in collector.of(job_id) if "ssvm.job_id" in each.attributes]

    until(lambda: len(found()) == attempts, f"{attempts} spans of {job_id} have come")
    return found()


def test_an_attempt(site: Site, http_server: HttpServer, collector: Collector) -> None:
    """A job's attempt is a span with its ids and its end, and each stage is a span below it."""
    worker = site.start()
    url = http_server.serve("image", DISK) + "?X-Amz-Signature=hush"
    job_id = site.submit("download", url=url, account="2", id="1", format="raw", headers={"Authorization": "hush"})
    assert site.wait(job_id).state == "succeeded"
    [span] = ended(collector, job_id, 1)
    assert (span.name, span.parent, span.status) == ("ssvm.download", "", 0)
    wanted = {"service.name": "ssvm-worker", "ssvm.zone": "z", "ssvm.attempt": 1, "ssvm.state": "succeeded"}
    assert wanted.items() <= span.attributes.items()
    stages = [each for each in collector.of(job_id) if each is not span]
    assert {each.parent for each in stages} == {span.span_id}
    assert {each.trace_id for each in stages} == {span.trace_id}
    assert [each.attributes["ssvm.bytes"] >= len(DISK) for each in stages if each.name == "committing"] == [True]
    assert "hush" not in collector.text
    assert worker.terminate() == 0


def test_the_senders_trace(site: Site, http_server: HttpServer, collector: Collector) -> None:
    """A message's traceparent puts all attempts into its trace, also those that the reaper starts."""
    site.start()
    url = http_server.serve("image", DISK, status=503, then=Behaviour(DISK))
    message = {"job_id": "theirs", "url": url, "account": "2", "id": "1", "format": "raw"}
    site.send("download", message, headers={"traceparent": TRACEPARENT})
    assert site.wait("theirs").state == "succeeded"
    first, second = ended(collector, "theirs", 2)
    assert [(each.trace_id, each.parent) for each in (first, second)] == [(TRACE, PARENT)] * 2
    assert (first.status, first.attributes["error.type"]) == (2, "SourceUnavailable")
    assert (first.attributes["ssvm.state"], second.attributes["ssvm.state"]) == ("queued", "succeeded")
    with Client.connect(site.broker.url, zone="z", prefix=site.broker.prefix) as client:
        job = client.submit("delete", account="2", id="1", traceparent=TRACEPARENT)
        odd = client.submit("delete", account="2", id="2", traceparent="hush hush")
        assert {client.wait(each.job_id).state for each in (job, odd)} == {"succeeded"}
    assert ended(collector, job.job_id, 1)[0].trace_id == TRACE
    assert ended(collector, odd.job_id, 1)[0].parent == ""


def test_in_the_foreground(site: Site, http_server: HttpServer, collector: Collector) -> None:
    """`ssvm run` uses the TRACEPARENT of its environment, and sends its spans before it ends."""
    url = http_server.serve("image", DISK, status=404)
    words = ["run", "download", "--url", url, "--account", "2", "--id", "1", "--job-id", "by-hand"]
    environ = {**os.environ, "SSVM_CONFIG": str(site.file), "TRACEPARENT": TRACEPARENT}
    done = subprocess.run([sys.executable, "-m", "ssvm_worker", *words], capture_output=True, env=environ)
    assert done.returncode == 1
    span = next(each for each in collector.of("by-hand") if each.parent == PARENT)
    assert (span.status, span.attributes["error.type"]) == (2, "SourceNotFound")


def test_no_collector(make_site: Callable[..., Site], http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absent collector does not affect a job."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # a pool process waits so many seconds at its end
    site = make_site()
    worker = site.start()
    url = http_server.serve("image", DISK)
    assert site.wait(site.submit("download", url=url, account="2", id="1", format="raw")).state == "succeeded"
    assert worker.terminate() == 0
