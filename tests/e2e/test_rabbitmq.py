"""RabbitMQ carries the messages, and the ledger stays in Redis, without other differences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import kombu
import pytest

from ssvm_worker.client import Client
from ssvm_worker.config.schema import Settings
from ssvm_worker.operations import health
from ssvm_worker.wiring.celery_sender import count_waiting, queue_checker
from ssvm_worker.wiring.message_transport import MessageRoute
from tests import images
from tests.servers.http import HttpServer
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.worker import Site, until
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e
DISK = images.mbr(1 << 20)


@pytest.fixture
def site(make_site: Callable[..., Site], rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> Site:
    """Return a site with its own zone, whose messages use TLS."""
    given: dict[str, Any] = {"messages": rabbitmq.tls_url, "ca_file": str(rabbitmq.ca_file)}
    return make_site(broker=given, zone=request.node.name.replace("test_", "").replace("[", "-").replace("]", ""))


def waits(settings: Settings, lane: str = "download") -> int | None:
    """Return the messages that no worker has."""
    return count_waiting(MessageRoute.of(settings), f"ssvm.{settings.zone}.{lane}")


def download(site: Site, url: str, number: int) -> str:
    """Submit a download."""
    return site.submit("download", url=url, account="1", id=f"t{number}", format="raw")


def told(site: Site, *words: str) -> tuple[int, str]:
    """Return the output of the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "ssvm_worker", *words],
        env={**os.environ, "SSVM_CONFIG": str(site.file)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_job(site: Site, rabbitmq: RabbitMQ, http_server: HttpServer) -> None:
    """A job that is submitted, and sent again by plain AMQP, runs once, and no list in Redis grows."""
    zone = site.settings.zone
    site.start()
    url = http_server.serve("image.raw", DISK)
    record = site.wait(download(site, url, 1))
    assert (record.state, len(record.attempts)) == ("succeeded", 1), record.error

    request = {"job_id": "by-hand", "url": url, "account": "1", "id": "t2"}
    with kombu.Connection(rabbitmq.url) as connection, connection.channel() as channel:
        headers = {"lang": "go", "task": "ssvm.download", "id": "by-hand", "root_id": "by-hand"}
        body = json.dumps([[request], {}, {}])
        message = channel.prepare_message(body, None, "application/json", "utf-8", headers, {"correlation_id": "x"})
        channel.basic_publish(message, exchange="", routing_key=f"ssvm.{zone}.download", mandatory=True)
    assert site.wait("by-hand").state == "succeeded"

    with site.broker.client() as client:
        assert list(client.scan_iter(f"{site.broker.prefix}ssvm.{zone}.*")) == []
        assert list(client.scan_iter(f"{site.broker.prefix}*kombu*")) == []
    status, text = told(site, "doctor")
    assert status == 0, text
    assert f"ssvm.{zone}.download: 0 waiting, 1 workers" in text
    assert "hush" not in text + told(site, "config")[1]


def nested(depth: int) -> list[Any]:
    """Return nested lists."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def test_odd_messages(site: Site, rabbitmq: RabbitMQ) -> None:
    """No message ends the worker or returns, for any properties, headers and body."""
    zone = site.settings.zone
    worker = site.start()
    good = {"lang": "go", "task": "ssvm.delete"}
    body = json.dumps([[{"account": "2", "id": "x"}], {}, {}])
    odd: dict[str, tuple[Any, str | None, dict[str, Any]]] = {
        "surrogate": ('[[{"account": "2", "id": "x", "callback_url": "http://h/\\ud800"}], {}, {}]', None, {}),
        "null": ("[null, {}, {}]", None, {}),
        "bytes": (b"\xff\xfe\x00", None, {}),
        "type": (body, "text/odd", {}),
        "list": (body, None, {"task": ["ssvm.delete"]}),
        "unknown": (body, None, {"task": "ssvm.downlaod"}),
        "packed": (body, None, {"compression": "application/x-gzip"}),
        "deep": (body, None, {"more": nested(300)}),
        "large": (json.dumps([[{"account": "2", "id": "x" * (300 << 10)}], {}, {}]), None, {}),
    }
    with kombu.Connection(rabbitmq.url) as connection, connection.channel() as channel:
        for job_id, (data, kind, headers) in odd.items():
            message = channel.prepare_message(
                data, None, kind or "application/json", "utf-8", good | {"id": job_id} | headers, {}
            )
            channel.basic_publish(message, exchange="", routing_key=f"ssvm.{zone}.maintenance")
    states = {job_id: site.wait(job_id).state for job_id in odd}
    assert states == dict.fromkeys(odd, "failed") | {"packed": "succeeded", "deep": "succeeded"}
    assert worker.process.poll() is None
    site.until(lambda: waits(site.settings, "maintenance") == 0, "the queue is empty")


def test_properties_that_cannot_be_read(site: Site, rabbitmq: RabbitMQ) -> None:
    """A message with too deeply nested headers is lost, and no other."""
    zone = site.settings.zone
    worker = site.start()
    table = b""
    for _ in range(20_000):  # a header "x" of nested arrays; AMQP 0-9-1, 4.2.1
        table = b"A" + len(table).to_bytes(4, "big") + table
    with kombu.Connection(rabbitmq.url) as connection, connection.channel() as channel:
        message = channel.prepare_message("[[], {}, {}]", None, "application/json", "utf-8", {"x": 1}, {})
        plain = message._serialize_properties()
        marked = b"\x01xI\x00\x00\x00\x01"
        assert marked in plain
        at = plain.index(marked)
        deep = b"\x01x" + table
        changed = plain[: at - 4] + len(deep).to_bytes(4, "big") + deep + plain[at + len(marked) :]
        message._serialize_properties = lambda: changed
        channel.basic_publish(message, exchange="", routing_key=f"ssvm.{zone}.maintenance")
    site.until(lambda: b"properties of a message cannot be read" in worker.log.read_bytes(), "the message has come")
    site.submit("delete", account="2", id="x", job_id="after")
    assert site.wait("after").state == "succeeded"
    assert worker.process.poll() is None


def test_a_lost_message(site: Site, rabbitmq: RabbitMQ, http_server: HttpServer) -> None:
    """The reaper sends a lost message again, but not one that is still in its queue."""
    job_id = download(site, http_server.serve("image.raw", DISK), 1)
    assert waits(site.settings) == 1

    def due() -> list[str]:
        with site.broker.client() as client:
            client.hset(f"{site.broker.prefix}ssvm.ledger:job:{job_id}", "ready", "0")  # long ago
        return [each.job_id for each in site.ledger.reap(0.001, 5, queue_checker(site.settings))]

    assert due() == []
    with kombu.Connection(rabbitmq.url) as connection, connection.channel() as channel:
        channel.queue_purge(f"ssvm.{site.settings.zone}.download")
    assert due() == [job_id]
    site.start()
    assert site.wait(job_id).state == "succeeded"


def test_no_worker_sits_on_a_message(site: Site, rabbitmq: RabbitMQ, http_server: HttpServer) -> None:
    """A job whose message a busy worker holds is run by another worker, without later harm."""
    slow = http_server.serve("slow.raw", DISK, rate=10_000.0)
    first = site.start()
    running = download(site, slow, 1)
    site.wait(running, "running")
    job_id = download(site, http_server.serve("image.raw", DISK), 2)
    until(lambda: waits(site.settings) == 0, "the busy worker has taken the message")
    site.start()
    record = site.wait(job_id)
    assert record.state == "succeeded"
    until(lambda: b"acknowledgement on channel 1 timed out" in rabbitmq.log.read_bytes(), "a channel is closed")
    until(lambda: b"acknowledgement on channel 1 timed out" in first.log.read_bytes(), "its worker has noticed")
    assert first.process.poll() is None
    assert site.ledger.get(running).state == "running"
    assert {record.attempts[0].worker} & {f"{os.uname().nodename}:{each}" for each in first.children()} == set()


def test_it_goes_away(site: Site, rabbitmq: RabbitMQ, http_server: HttpServer) -> None:
    """Without RabbitMQ, running jobs continue, and new jobs are kept until it is back."""
    worker = site.start()
    running = download(site, http_server.serve("slow.raw", DISK, rate=300_000.0), 1)
    site.wait(running, "running")
    with Client.connect(
        site.broker.url,
        zone=site.settings.zone,
        prefix=site.broker.prefix,
        messages=rabbitmq.tls_url,
        ca_file=str(rabbitmq.ca_file),
    ) as client:
        until(lambda: health.unready(site.settings) == "", "the worker is ready")
        rabbitmq.stop()
        try:
            meanwhile = client.submit(
                "download", url=http_server.serve("image.raw", DISK), account="1", id="t2", format="raw"
            )
            until(lambda: "it receives no messages" in health.unready(site.settings), "the worker says so")
            assert site.wait(running).state == "succeeded"
            status, text = told(site, "doctor")
            assert (status, "RabbitMQ cannot be used" in text) == (1, True)
        finally:
            rabbitmq.start()
        assert client.wait(meanwhile.job_id, timeout_s=PATIENCE_S).state == "succeeded"
    until(lambda: health.unready(site.settings) == "", "the worker is ready again")
    assert worker.process.poll() is None
