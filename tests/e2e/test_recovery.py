"""No job is lost and none runs twice after faults of workers and broker: real processes, a real broker."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.errors import EXIT_RETRYABLE, StoreUnavailable
from ssvm_worker.ledger.record import Record
from tests.servers.broker import Broker, StoppableBroker
from tests.servers.http import Behaviour, HttpServer
from tests.servers.receiver import Receiver
from tests.servers.worker import Site, WorkerProcess
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e

MiB = 1 << 20
DATA = os.urandom(6 * MiB)
CHECKSUM = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
#: The byte at which the source first becomes silent.
HALF = 3 * MiB
ARTIFACT = [f"template/tmpl/1/t1/{name}" for name in ("manifest.json", "t1.raw", "template.properties")]


def download(site: Site, url: str, **fields: object) -> str:
    """Submit a download with its checksum."""
    given = {"account": "1", "id": "t1", "format": "raw", "checksum": CHECKSUM}
    return site.submit("download", url=url, **(given | fields))


def stalling(http_server: HttpServer) -> str:
    """Return a source that becomes silent half way at the first request, and sends all bytes later."""
    return http_server.serve("image.raw", DATA, stall_after=HALF, then=Behaviour(DATA))


def slow(http_server: HttpServer) -> str:
    """Return a source that would take a minute."""
    return http_server.serve("image.raw", DATA, rate=100_000.0)


def half_way(site: Site, url: str) -> str:
    """Return a job whose first bytes are durable, and whose source is silent."""
    job_id = download(site, url)
    site.until(lambda: site.durable_bytes() >= MiB, "the draft says that the first bytes are durable")
    return job_id


def assert_whole(site: Site, record: Record) -> None:
    """Check that the job succeeded, and that the store has exactly the artifact."""
    assert record.state == "succeeded", record.error
    assert (site.store / "template/tmpl/1/t1/t1.raw").read_bytes() == DATA
    assert site.files() == ARTIFACT


def assert_resumed(http_server: HttpServer) -> None:
    """Check that the last request asked only for the rest."""
    assert int(http_server.requests[-1].headers.get("Range", "bytes=0-")[6:-1]) > 0


def test_plain(site: Site, http_server: HttpServer) -> None:
    """A worker runs a submitted download once."""
    site.start()
    record = site.wait(download(site, http_server.serve("image.raw", DATA)))
    assert_whole(site, record)
    assert len(record.attempts) == 1


def kill_main(worker: WorkerProcess) -> None:
    """Kill -9 only the main process; its pool must not continue."""
    worker.process.kill()


def kill_child(worker: WorkerProcess) -> None:
    """Kill -9 the pool's processes, as the out-of-memory killer does."""
    for child in worker.children():
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "hurt",
    [WorkerProcess.kill, kill_main, kill_child],
    ids=["all of the worker is killed", "its main process is killed", "its pool process is killed"],
)
def test_killed(site: Site, http_server: HttpServer, hurt: Callable[[WorkerProcess], None]) -> None:
    """A job whose worker is killed half way is finished by another, from the stored bytes."""
    first = site.start()
    job_id = half_way(site, stalling(http_server))
    site.start()
    hurt(first)
    record = site.wait(job_id)
    assert_whole(site, record)
    assert_resumed(http_server)
    assert [each.error["error"] if each.error else None for each in record.attempts] == ["WorkerLost", None]


def test_frozen(site: Site, http_server: HttpServer) -> None:
    """A worker that was frozen for longer than its claim commits nothing when it resumes."""
    first = site.start()
    job_id = half_way(site, stalling(http_server))
    first.signal_all(signal.SIGSTOP)
    site.start()
    record = site.wait(job_id)
    first.signal_all(signal.SIGCONT)
    site.until(
        lambda: b"belongs to another worker" in first.log.read_bytes(), "the first worker sees that it is fenced"
    )
    assert_whole(site, record)
    assert site.ledger.get(job_id) == record


def test_terminated(site: Site, http_server: HttpServer) -> None:
    """After SIGTERM a worker returns its job at once, without a counted attempt."""
    first = site.start()
    job_id = download(site, slow(http_server))
    site.until(lambda: site.stored_bytes() > 0, "the first bytes are stored")
    http_server.serve("image.raw", DATA)
    first.terminate()
    site.start()
    record = site.wait(job_id)
    assert_whole(site, record)
    assert_resumed(http_server)
    assert (len(record.attempts), record.tries) == (2, 1)


#: Sends SIGTERM to the main process after the header of the third message of its pool process. The first
#: says that the process is up, the second that the job runs, and the third is the result.
_SIGNAL_IN_RESULT = """
import itertools, os, signal
from celery.concurrency import asynpool

headers, read = itertools.count(1), asynpool.__read__

def read_and_signal(handle, buffer, size, *more):
    done = read(handle, buffer, size, *more)
    if size == 4 and next(headers) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return done

asynpool.ResultHandler._recv_message.__defaults__ = (
    read_and_signal, *asynpool.ResultHandler._recv_message.__defaults__[1:]
)
"""


def test_terminated_in_a_result(site: Site, http_server: HttpServer, tmp_path: Path) -> None:
    """A worker whose SIGTERM arrives while it reads a result ends, and does not wait for the result forever."""
    (tmp_path / "sitecustomize.py").write_text(_SIGNAL_IN_RESULT)
    worker = WorkerProcess(site.settings, site.file, site.directory / "log", {"PYTHONPATH": str(tmp_path)})
    site.workers.append(worker)
    worker.wait_ready()
    job_id = download(site, http_server.serve("image.raw", DATA))
    assert worker.process.wait(PATIENCE_S) == 0
    assert site.wait(job_id).state == "succeeded"


def test_cancel_running(site: Site, http_server: HttpServer) -> None:
    """A cancel stops a running transfer and leaves nothing on the store."""
    site.start()
    job_id = download(site, slow(http_server))
    site.until(lambda: site.stored_bytes() > 0, "the first bytes are stored")
    site.ledger.cancel(job_id, "ann")
    record = site.wait(job_id)
    assert (record.state, site.files()) == ("cancelled", [])


def test_cancel_between_attempts(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """A cancel of a job between two attempts deletes the last attempt's leftovers."""
    site = make_site(retry={"first_delay_s": 600, "max_delay_s": 600, "max_attempts": 4})
    site.start()
    job_id = download(site, http_server.serve("image.raw", DATA, cut_after=HALF))
    site.until(lambda: site.ledger.get(job_id).tries == 1, "the first attempt has begun")
    site.wait(job_id, "queued")
    assert site.files()
    site.ledger.cancel(job_id, "ann")
    record = site.wait(job_id)
    assert (record.state, site.files()) == ("cancelled", [])


def test_broker_restarts(
    make_site: Callable[..., Site], stoppable_broker: StoppableBroker, http_server: HttpServer
) -> None:
    """A broker restart does not affect a running job, and only delays a queued one."""
    site = make_site(on=stoppable_broker.with_prefix("ssvm:"))
    worker = site.start()
    running = download(site, http_server.serve("image.raw", DATA, rate=2.0 * MiB))
    queued = download(site, http_server.serve("other.raw", DATA), id="t2")
    site.until(lambda: site.stored_bytes() > 0, "the first bytes are stored")
    stoppable_broker.stop()
    site.until(lambda: b"continues without its ledger" in worker.log.read_bytes(), "the job feels it")
    stoppable_broker.start()
    records = [site.wait(each) for each in (running, queued)]
    assert [(each.state, len(each.attempts)) for each in records] == [("succeeded", 1), ("succeeded", 1)]
    assert len(site.files()) == 2 * len(ARTIFACT)


def test_retryable(site: Site, http_server: HttpServer) -> None:
    """A source that fails twice gets a third attempt, and the history has the reasons."""
    gone = Behaviour(b"try later", status=503, then=Behaviour(DATA))
    site.start()
    record = site.wait(download(site, http_server.serve("image.raw", b"try later", status=503, then=gone)))
    assert_whole(site, record)
    errors = [each.error["error"] if each.error else None for each in record.attempts]
    assert errors == ["SourceUnavailable", "SourceUnavailable", None]


def test_permanent_then_retry(site: Site, http_server: HttpServer) -> None:
    """A permanent error is retried only by a user, and the job then succeeds under its id."""
    site.start()
    job_id = download(site, http_server.url("image.raw"))
    failed = site.wait(job_id)
    assert (failed.state, len(failed.attempts), site.files()) == ("failed", 1, [])
    http_server.serve("image.raw", DATA)
    site.send("retry", {"job_id": job_id, "by": "ann"})
    site.until(lambda: len(site.ledger.get(job_id).attempts) == 2, "the second attempt has begun")
    record = site.wait(job_id)
    assert_whole(site, record)
    assert record.attempts[1].by == "ann"


def test_worker_killer(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """A job that loses every worker fails, and its leftovers are deleted."""
    site = make_site(retry={"max_attempts": 1})
    worker = site.start()
    job_id = half_way(site, stalling(http_server))
    kill_child(worker)
    record = site.wait(job_id)
    assert (record.state, site.files()) == ("failed", [])
    assert record.error
    assert record.error["error"] == "WorkerLost"


def test_callback(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """At the end of a job its record is sent and signed until the receiver accepts it."""
    site = make_site(callback={"secret": "sesame"})
    site.start()
    with Receiver(503) as receiver:
        download(site, http_server.serve("image.raw", DATA), job_id="j1", callback_url=receiver.url)
        site.until(lambda: site.ledger.get("j1").callback.state == "delivered", "the callback is delivered")
    headers, body = receiver.got[-1]
    assert json.loads(body)["state"] == "succeeded"
    assert headers["X-SSVM-Signature"] == f"sha256={hmac.new(b'sesame', body, hashlib.sha256).hexdigest()}"


def test_embedded(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """A worker with an embedded broker starts it, other processes find it, and it ends with the worker."""
    site = make_site(on=Broker("embedded", "ssvm:"))
    worker = site.start()
    assert_whole(site, site.wait(download(site, http_server.serve("image.raw", DATA))))
    worker.terminate()
    with pytest.raises(StoreUnavailable):
        site.ledger.counts()


def test_broker_down_at_submit(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """Without a broker a submission fails with a temporary exit status."""
    site = make_site(on=Broker("redis://127.0.0.1:1/0", "ssvm:"))
    command = [sys.executable, "-m", "ssvm_worker", "submit", "download", "--url", http_server.url("image.raw")]
    command += ["--account", "1", "--id", "t1"]
    ended = subprocess.run(command, env={**os.environ, "SSVM_CONFIG": str(site.file)}, capture_output=True, text=True)
    assert ended.returncode == EXIT_RETRYABLE, ended.stderr
    assert "broker cannot be reached" in ended.stderr
