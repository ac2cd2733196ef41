"""`ssvm doctor` shows the state of every dependency, and a remedy for each problem."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssvm_worker import cli
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import INBOUND, NewJob
from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from ssvm_worker.operations.doctor import examine
from ssvm_worker.operations.finding import Finding
from ssvm_worker.units import MiB
from tests.neighbours import free_port, missing
from tests.servers.broker import Broker
from tests.servers.disk import SmallDisk, require_mounts
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import S3Server
from tests.servers.versity import VersityS3


def conversion(scratch: Path | None) -> Finding:
    """Return the findings about conversions; all other servers are absent."""
    broker = {"url": f"redis://127.0.0.1:{free_port()}/0"}
    settings = Settings.model_validate({"broker": broker, "download": {"scratch_dir": scratch}})
    return next(each for each in examine(settings) if each.check == "conversion")


def test_conversion(tmp_path: Path) -> None:
    """If images are converted, doctor names qemu-img and the directory."""
    if not shutil.which("qemu-img"):
        missing("qemu-img", "apt-get install qemu-utils")
    found = conversion(tmp_path)
    assert found.ok
    assert str(tmp_path) in found.detail
    assert "qemu-img" in found.detail


def test_no_conversion() -> None:
    """If no images are converted, doctor requires nothing for it."""
    assert conversion(None) == Finding("conversion", True, "off: download.scratch_dir is not set")


def test_conversion_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing directory or tool is a failure that names it."""
    assert "No such file" in conversion(tmp_path / "away").detail
    monkeypatch.setenv("PATH", str(tmp_path))
    found = conversion(tmp_path)
    assert not found.ok
    assert "Install qemu-utils" in found.detail


def archive(server: Any, tmp_path: Path, bucket: str) -> list[Finding]:
    """Return the findings about an S3 store; all other servers are absent."""
    keys = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    values = {
        "state_dir": tmp_path,
        "broker": {"url": f"redis://127.0.0.1:{free_port()}/0"},
        "stores": {"archive": {"url": f"s3://{bucket}/prefix", "ca_file": getattr(server, "ca_file", None), **keys}},
    }
    return [each for each in examine(Settings.model_validate(values)) if each.check.startswith("store archive")]


def test_full_store(tmp_path: Path) -> None:
    """A store with little free space is a warning with a remedy, before jobs fail."""
    require_mounts()
    values = {"broker": {"url": f"redis://127.0.0.1:{free_port()}/0"}, "stores": {"a": {"url": f"file://{tmp_path}"}}}
    with contextlib.closing(SmallDisk(tmp_path, 8 * MiB)) as disk:
        disk.fill(leave=MiB // 4)
        [row] = [each.as_dict() for each in examine(Settings.model_validate(values)) if each.check == "store a"]
    assert row["state"] == "warning"
    assert "less than 5%. Delete artifacts" in row["detail"]


def test_s3(s3_server: S3Server, tmp_path: Path) -> None:
    """doctor shows an S3 server's features, and prints the lifecycle rule once, ready to apply."""
    bucket, client = s3_server.make_bucket(), s3_server.client()
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [theirs]})

    store, uploads = archive(s3_server, tmp_path, bucket)
    assert "SHA-256 checksums, conditional commits" in store.detail
    command = shlex.split(uploads.detail[uploads.detail.index("aws s3api") :])
    assert command[command.index("--endpoint-url") + 1] == s3_server.endpoint
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(command[-1]))

    store, uploads = archive(s3_server, tmp_path, bucket)
    assert "a lifecycle rule of the bucket aborts them" in uploads.detail
    rules = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert [each["ID"] for each in rules] == ["theirs", "abandoned-uploads"]


def test_s3_that_may_not_be_written(rclone_s3: RcloneS3, tmp_path: Path) -> None:
    """A missing bucket is a failure, and doctor warns that it did not see the rules of the bucket."""
    store, uploads = archive(rclone_s3, tmp_path, "no-such-bucket")
    assert (store.ok, uploads.ok, uploads.warning) == (False, True, True)
    assert "no-such-bucket" in store.detail
    assert "not checked whether the bucket does so too: StoreDenied" in uploads.detail


@pytest.mark.parametrize("server", ["s3_server", "rclone_s3", "versity_s3"])
def test_s3_that_refuses_the_keys(server: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """If S3 refuses the keys, doctor does not say that a rule of the bucket is in order."""
    running = request.getfixturevalue(server)
    bucket = running.make_bucket()
    refused = SimpleNamespace(
        endpoint=running.endpoint,
        access_key=running.access_key,
        secret_key="wrong",
        ca_file=getattr(running, "ca_file", None),
    )
    store, uploads = archive(refused, tmp_path, bucket)
    assert (store.as_dict()["state"], uploads.as_dict()["state"]) == ("failed", "warning")
    assert "not checked whether the bucket does so too: StoreDenied" in uploads.detail


def test_s3_without_rules(versity_s3: VersityS3, tmp_path: Path) -> None:
    """A server without lifecycle rules is no warning."""
    store, uploads = archive(versity_s3, tmp_path, versity_s3.make_bucket())
    assert (store.as_dict()["state"], uploads.as_dict()["state"]) == ("ok", "ok")
    assert "the server has no lifecycle rules" in uploads.detail


JOB = NewJob("j1", "download", "z", "download", {"url": "http://x/y"})
WORKER = WorkerInfo("w1", "host", "z", ("download",), 4, "1.0", started=1.0, every_s=1e6)


class Site:
    """A broker, and doctor's findings about workers and jobs."""

    def __init__(self, broker: Broker) -> None:
        self.settings = parse({"zone": "z", "broker": {"url": broker.url, "prefix": broker.prefix}}, "the test")
        self.registry = WorkerRegistry(broker.url, prefix=broker.prefix)
        self.ledger = Ledger(broker.url, prefix=broker.prefix, claim_s=1000)

    def rows(self) -> list[tuple[str, str]]:
        """Return state and detail."""
        found = [each.as_dict() for each in examine(self.settings)]
        return [(each["state"], each["detail"]) for each in found if each["check"] in ("workers", "jobs")]


@pytest.fixture
def site(broker: Broker) -> Site:
    """Return a site without jobs and workers."""
    return Site(broker)


def test_no_worker(site: Site) -> None:
    """Waiting jobs without a worker are a failure that says how to start one."""
    site.ledger.submit(JOB)
    [(state, detail)] = site.rows()
    assert state == "failed"
    assert "zone z: 1 queued, 0 running, no worker is up. Start one" in detail
    assert "systemctl start ssvm-worker@z" in detail


def test_running_without_a_worker(site: Site) -> None:
    """A running job whose worker is gone is a failure too."""
    site.ledger.submit(JOB)
    assert site.ledger.claim("j1", "w1")
    assert [state for state, _ in site.rows()] == ["failed"]


def test_a_worker_is_up(site: Site) -> None:
    """A worker that is up and takes the jobs is no finding."""
    site.ledger.submit(JOB)
    site.registry.beat(replace(WORKER, active=1))
    assert site.rows() == [("ok", "zone z: 1 up, 1 of 4 places in use")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"draining": True}, f"{WORKER.name} ends its jobs and takes no new ones. Start one"),
        ({"connected": False}, f"no worker is up. {WORKER.name} runs, but receives no messages yet. If this"),
    ],
)
def test_a_worker_that_takes_nothing(site: Site, change: dict[str, bool], reason: str) -> None:
    """A worker that drains, or receives no messages, is not up, and the finding says which of these it does."""
    site.ledger.submit(JOB)
    site.registry.beat(replace(WORKER, **change))  # type: ignore[arg-type]
    [(state, detail)] = site.rows()
    assert (state, reason in detail) == ("failed", True), detail


def test_a_lane_that_no_worker_takes(site: Site) -> None:
    """Jobs of a lane that no worker takes are a failure."""
    site.ledger.submit(replace(JOB, lane="backup"))
    site.registry.beat(WORKER)
    assert [state for state, _ in site.rows()] == ["ok", "failed"]
    assert "lane backup, which no worker takes" in site.rows()[1][1]


def test_another_zone_without_a_worker(site: Site) -> None:
    """Jobs of another zone without workers are a warning, because the zone may be a typing error."""
    site.ledger.submit(replace(JOB, zone="zoneX"))
    site.registry.beat(WORKER)
    assert [(state, "zone zoneX: 1 queued" in detail) for state, detail in site.rows()] == [
        ("ok", False),
        ("warning", True),
    ]


def test_nothing_to_do(site: Site) -> None:
    """A zone without workers and jobs is a warning, and an upload that waits for its sender does not count."""
    site.ledger.submit(replace(JOB, lane=INBOUND))
    assert [state for state, _ in site.rows()] == ["warning"]


def test_down_old_and_failed(site: Site) -> None:
    """Killed workers, jobs that wait long, and recently failed jobs are warnings."""
    site.ledger.submit(JOB)
    site.ledger.submit(replace(JOB, job_id="fails"))
    claim = site.ledger.claim("fails", "w")
    assert claim
    site.ledger.finish(claim, "failed", error={"error": "StoreFull", "remedy": "Free space, then retry"})
    site.registry.beat(WORKER)
    site.registry.beat(replace(WORKER, name="w2", every_s=1.0))
    client, prefix = site.registry._redis, site.registry._key.removesuffix("ssvm.workers")
    client.zincrby(f"{prefix}ssvm.workers:seen", -3600, "w2")
    client.zincrby(f"{prefix}ssvm.ledger:in:queued z download", -3600, "j1")
    rows = site.rows()
    assert [state for state, _ in rows] == ["ok", "warning", "warning", "warning"]
    failed = "1 failed in the last hour with StoreFull. Free space, then retry. See `ssvm jobs --state failed --error"
    for (_, detail), part in zip(rows[1:], ["cut off: w2 since", "waits for", failed], strict=True):
        assert part in detail


def test_exit_status_and_settings_file(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings row names the file or warns that none exists, and a failure makes the exit status 1."""
    file = tmp_path / "worker.toml"
    broker = site.settings.broker
    (tmp_path / "store").mkdir()
    file.write_text(
        f'zone = "z"\n[broker]\nurl = "{broker.url.get_secret_value()}"\nprefix = "{broker.prefix}"\n'
        f'[stores.primary]\nurl = "file://{tmp_path}/store"\n'
    )
    assert cli.main(["doctor", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {
        "check": "settings",
        "ok": True,
        "state": "ok",
        "detail": f"{file}; zone z",
    }
    site.ledger.submit(JOB)
    assert cli.main(["doctor", "--config", str(file)]) == 1
    assert "no worker is up" in capsys.readouterr().out
    [first, *_] = examine(site.settings)
    assert (first.warning, "ssvm config init" in first.detail) == (True, True)


def test_submit_warns(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ssvm submit` warns on standard error if no worker takes the job now."""
    file, broker = tmp_path / "worker.toml", site.settings.broker
    (tmp_path / "store").mkdir()
    file.write_text(
        f'zone = "z"\n[broker]\nurl = "{broker.url.get_secret_value()}"\nprefix = "{broker.prefix}"\n'
        f'[stores.primary]\nurl = "file://{tmp_path}/store"\n'
    )
    words = ["submit", "delete", "--account", "2", "--id", "7", "--stores", "primary", "--config", str(file)]
    assert cli.main([*words, "--zone", "zoneX"]) == 0
    assert "no worker of zone zoneX is up" in capsys.readouterr().err
    site.registry.beat(WORKER)
    assert cli.main([*words, "--id", "8"]) == 0
    assert "no worker of zone z takes lane maintenance" in capsys.readouterr().err
    site.registry.beat(replace(WORKER, lanes=("maintenance",)))
    assert cli.main([*words, "--id", "9"]) == 0
    assert capsys.readouterr().err == ""
