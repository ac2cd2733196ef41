"""The recipes in config/redis work: TLS, users, a durable ledger, and a master that may fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import redis
import trustme

from ssvm_worker.config import parse
from ssvm_worker.errors import StoreDenied, StoreUnavailable
from ssvm_worker.wiring.assembly import open_job_metrics, open_ledger
from tests import images
from tests.servers.broker import Broker, StoppableBroker
from tests.servers.flower import Flower
from tests.servers.http import HttpServer
from tests.servers.recipes import PASSWORD, Group, LockedServer, Server
from tests.servers.worker import ROOT, Site, until

pytestmark = pytest.mark.e2e
DISK = images.mbr(1 << 20)


@pytest.fixture
def locked_site(make_site: Callable[..., Site], locked_server: LockedServer) -> Site:
    """Return a site whose broker needs TLS and a user."""
    return make_site(Broker(locked_server.url(), "ssvm:"), broker={"ca_file": str(locked_server.ca_file)})


def told(site: Site, program: str, *words: str) -> str:
    """Return the output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", program, *words],
        env={**os.environ, "SSVM_CONFIG": str(site.file)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_users_rights_suffice(locked_site: Site, locked_server: LockedServer, http_server: HttpServer) -> None:
    """Worker, commands and Flower do all their work as the user of users.acl, without a refusal."""
    site = locked_site
    site.start()
    url = http_server.serve("image.raw", DISK)
    record = site.wait(site.submit("download", url=url, account="1", id="t1", format="raw"))
    assert record.state == "succeeded", record.error
    failed = site.wait(site.submit("download", url=http_server.url("gone"), account="1", id="t2", format="raw"))
    assert failed.state == "failed"
    site.ledger.retry(failed.job_id, "ann")
    flower = Flower(site)
    try:
        until(lambda: flower.ask("GET", f"/task/{record.job_id}")[0] in (200, 404), "Flower answers")
        until(lambda: '"z-' in flower.ask("GET", "/api/workers?refresh=1")[1], "Flower hears of the worker")
    finally:
        flower.process.terminate()
        flower.process.wait()
    for words in (["workers"], ["reap"], ["scale"], ["metrics"], ["cleanup", "--dry-run"], ["verify", "--all"]):
        told(site, "ssvm_worker", *words)
    assert "pong" in told(site, "tasks", "inspect", "ping")
    broker = [line for line in told(site, "ssvm_worker", "doctor").splitlines() if line.startswith("broker")]
    assert broker
    assert "warning" not in "".join(broker)
    with locked_server.client("admin") as admin:
        assert admin.acl_log() == []


def test_others_are_refused(locked_site: Site, locked_server: LockedServer) -> None:
    """Without the right password, user and authority the broker refuses, and the user has no other rights."""
    locked_site.ledger.counts()
    ca_file = str(locked_server.ca_file)

    def asked(url: str, authority: str | None = ca_file) -> None:
        given = {"url": url, "prefix": "ssvm:"} | ({"ca_file": authority} if authority else {})
        with open_ledger(parse({"broker": given}, "the test")) as ledger:
            ledger.counts()

    for user, password in (("ssvm", "wrong"), ("other", "hush-acl"), ("default", "")):
        with pytest.raises(StoreDenied):
            asked(locked_server.url(user, password))
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        asked(locked_server.url(), None)
    with pytest.raises(StoreUnavailable):
        asked(locked_server.url().replace("rediss", "redis"))
    with locked_server.client("other") as other, pytest.raises(redis.exceptions.NoPermissionError):
        other.lpush("ssvm:ssvm.z.download", "a message")
    with locked_server.client("ssvm") as ours:
        for refused in (("GET", "other:1"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("ACL", "LIST")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                ours.execute_command(*refused)


def test_another_authority(locked_site: Site, locked_server: LockedServer) -> None:
    """A worker does not use a broker whose certificate another authority has signed."""
    trustme.CA().cert_pem.write_to_path(str(locked_server.ca_file))
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        locked_site.ledger.counts()
    with pytest.raises(AssertionError, match="certificate verify failed"):
        told(locked_site, "tasks", "inspect", "ping")


def test_records_survive(locked_site: Site, locked_server: LockedServer, http_server: HttpServer) -> None:
    """A job that was just submitted still exists after kill -9 of the broker."""
    ids = [locked_site.submit("delete", account="1", id=f"t{number}") for number in range(3)]
    with locked_server.client("admin") as admin:
        # appendfsync everysec: data that is a second or two old.
        until(lambda: admin.info("persistence")["aof_buffer_length"] == 0, "it is handed to the kernel")
    locked_server.kill()
    locked_server.start()
    assert {each.job_id for each in locked_site.ledger.page(limit=100)} == set(ids)
    locked_site.start()
    assert {locked_site.wait(each).state for each in ids} == {"succeeded"}


def test_sentinels_by_tls(
    make_site: Callable[..., Site], locked_server: LockedServer, locked_sentinel: Server, http_server: HttpServer
) -> None:
    """Sentinels and their master need TLS and a password, and refuse clients without them."""
    url = f"sentinels://ssvm:{PASSWORD}@localhost:{locked_sentinel.port}/0?master=ssvm"
    given = {"ca_file": str(locked_server.ca_file), "sentinel_password": PASSWORD}
    site = make_site(Broker(url, "ssvm:"), broker=given)
    until(lambda: not away(site), "the Sentinel knows its master")
    site.start()
    record = site.wait(site.submit("download", url=http_server.serve("i", DISK), account="1", id="t1", format="raw"))
    assert record.state == "succeeded", record.error
    for missing in given:
        wrong = parse({"broker": {"url": url, **given, "prefix": "ssvm:"} | {missing: None}}, "the test")
        with open_ledger(wrong) as ledger, pytest.raises((StoreUnavailable, StoreDenied)):
            ledger.counts()


def away(site: Site) -> str:
    """Return why the ledger cannot be written; a new master waits for a replica (replication.conf)."""
    try:
        open_job_metrics(site.settings).demand("nowhere", 1, 60)
    except StoreUnavailable as error:
        return str(error)
    return ""


def test_the_master_dies(make_site: Callable[..., Site], sentinel_group: Group, http_server: HttpServer) -> None:
    """A job continues when its ledger's master is killed, and later submissions run too."""
    site = make_site(Broker(sentinel_group.url, "ssvm:"))
    worker = site.start()
    job_id = site.submit("download", url=http_server.serve("slow", DISK, rate=100_000.0), account="1", id="t1")
    until(lambda: site.stored_bytes() > 0, "the first bytes are stored")
    before = sentinel_group.master()
    before.kill()
    until(lambda: sentinel_group.master() is not before and not away(site), "another server is the master")
    record = site.wait(job_id)
    assert (record.state, len(record.attempts)) == ("succeeded", 1), record.error
    again = site.submit("download", url=http_server.serve("image", DISK), account="1", id="t2")
    assert site.wait(again).state == "succeeded"
    until(lambda: "1/1" not in told(site, "ssvm_worker", "workers"), "the worker says that it has nothing to do")
    assert worker.process.poll() is None


def test_a_master_without_replicas(
    make_site: Callable[..., Site], stoppable_broker: StoppableBroker, http_server: HttpServer
) -> None:
    """A broker that refuses writes for a while (min-replicas-to-write) only delays a worker."""
    site = make_site(on=stoppable_broker.with_prefix("ssvm:"))
    worker = site.start()
    with site.broker.client() as client:
        client.config_set("min-replicas-to-write", 1)
        assert "NOREPLICAS" in away(site)
        until(lambda: b"Connection to broker lost" in worker.log.read_bytes(), "the worker feels it")
        until(lambda: b"NOREPLICAS" in worker.log.read_bytes(), "and says why")
        client.config_set("min-replicas-to-write", 0)
    job_id = site.submit("download", url=http_server.serve("i", DISK), account="1", id="t1", format="raw")
    assert site.wait(job_id).state == "succeeded"
    assert worker.process.poll() is None
