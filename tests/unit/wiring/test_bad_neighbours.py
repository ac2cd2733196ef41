"""Faults of a vCenter, an S3 server or the broker from a user's view: the second half of test_bad_input.

Each row runs the real command against a real server. The tests of each adapter cover more cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cli import main
from ssvm_worker.demo.simulator import VCenterSimulator
from tests import images
from tests.neighbours import free_port
from tests.servers.http import HttpServer
from tests.servers.s3_faults import Fault, FaultyS3
from tests.servers.vcenter import TestVM

Environ = dict[str, str]


@dataclass
class Case:
    """A fault and its expected outcome."""

    error: str
    said: str
    exit: int = 1
    #: Set by the settings' environment names.
    environ: Environ = field(default_factory=dict)
    #: Fields of the request.
    asked: dict[str, Any] = field(default_factory=dict)
    #: Parameters of the server.
    faults: dict[str, Any] = field(default_factory=dict)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Return the exit status of a command, and its JSON output."""
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def assert_told(case: Case, status: int, shown: dict[str, Any]) -> None:
    """Check the error's class, problem, location and remedy, and the exit status."""
    assert (shown["error"], status) == (case.error, case.exit), shown
    assert case.said in f"{shown['message']} {shown['remedy']}"
    assert shown["what"]
    assert shown["where"]
    assert shown["remedy"]
    assert "s3cret" not in json.dumps(shown)


ONCE = {"SSVM_BACKUP__LEASE_TRIES": "1"}
CUT = {"file": "disk-0.vmdk", "times": 0, "at": 300_000}
VCENTER = {
    "unknown vCenter": Case("InvalidRequest", "vc1", 2, asked={"vcenter": "elsewhere"}),
    "unknown VM": Case("SourceNotFound", "/DC0/vm/nowhere", asked={"vm": "/DC0/vm/nowhere"}),
    "unknown disk": Case("InvalidRequest", "scsi0:1", asked={"disks": ["scsi0:9"]}),
    "unknown snapshot": Case("SourceNotFound", "no-such", asked={"snapshot": "no-such"}),
    "unreachable": Case("SourceUnavailable", "refused", 75, {"SSVM_VCENTERS__VC1__PORT": "{free}"}),
    "wrong password": Case("SourceDenied", "password", environ={"SSVM_VCENTERS__VC1__PASSWORD": "s3cret!"}),
    "untrusted certificate": Case("SourceDenied", "thumbprint", environ={"SSVM_VCENTERS__VC1__THUMBPRINT": "ab" * 20}),
    "lease that ends": Case("LeaseLost", "lease", 75, ONCE, faults={"lease_error": "Timedout"}),
    "lease that expires": Case("SourceUnavailable", "disk-0", 75, ONCE, faults={"get": CUT | {"do": "expire"}}),
    "stream cut in the middle": Case("SourceUnavailable", "disk-0", 75, ONCE, faults={"get": CUT | {"do": "cut"}}),
    "stream that is empty": Case(
        "SourceUnavailable", "is empty", 75, ONCE, faults={"get": CUT | {"do": "end", "at": 0}}
    ),
    "no privilege": Case("SourceDenied", "privilege", faults={"calls": {"ExportSnapshot": "NoPermission"}}),
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Environ], None]:
    """Set settings over those of a store in a directory, without a broker."""
    (tmp_path / "store").mkdir()
    given = {
        "SSVM_STATE_DIR": str(tmp_path / "state"),
        "SSVM_STORES__PRIMARY__URL": f"file://{tmp_path}/store",
        "SSVM_DOWNLOAD__ALLOW_NETWORKS": "127.0.0.0/8",
    }

    def use(environ: Environ) -> None:
        for name, value in (given | environ).items():
            monkeypatch.setenv(name, value.replace("{free}", str(free_port())))

    return use


@pytest.mark.parametrize("name", VCENTER)
def test_vcenter(
    vcenter: VCenterSimulator,
    vm: TestVM,
    name: str,
    settings: Callable[[Environ], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A backup that fails gives a clear error, and leaves nothing on the store."""
    case = VCENTER[name]
    access = {"HOST": vcenter.host, "PORT": str(vcenter.port), "CA_FILE": str(vcenter.ca_file)}
    access |= {"USERNAME": vcenter.username, "PASSWORD": vcenter.password}
    settings({f"SSVM_VCENTERS__VC1__{each}": value for each, value in access.items()} | case.environ)
    vcenter.fault(**case.faults)
    asked = {"vcenter": "vc1", "vm": vm.machine.id, "account": "2", "volume": "17", "id": "b1"} | case.asked
    (tmp_path / "request").write_text(json.dumps(asked))

    assert_told(case, *said(capsys, "run", "backup", "--request", str(tmp_path / "request")))

    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


ARCHIVE = "SSVM_STORES__ARCHIVE__"
ALWAYS = 1_000
S3 = {
    "wrong keys": Case("StoreDenied", "secret_key", environ={ARCHIVE + "SECRET_KEY": "s3cret!"}),
    "no such bucket": Case("StoreDenied", "no-such-bucket", environ={ARCHIVE + "URL": "s3://no-such-bucket/x"}),
    "no server listens": Case("StoreAway", "endpoint", 75, {ARCHIVE + "ENDPOINT": "http://127.0.0.1:{free}"}),
    "500 each time": Case("StoreUnavailable", "InternalError", 75, faults={"status": 500, "code": "InternalError"}),
    "SlowDown each time": Case("StoreAway", "SlowDown", 75, faults={"status": 503, "code": "SlowDown"}),
    "full": Case("StoreFull", "InsufficientStorage", faults={"status": 507, "code": "InsufficientStorage"}),
}


@pytest.mark.parametrize("name", S3)
def test_s3(
    faulty_s3: FaultyS3,
    s3_bucket: str,
    http_server: HttpServer,
    name: str,
    settings: Callable[[Environ], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A download that S3 does not accept gives a clear error, and leaves nothing there."""
    case, place = S3[name], f"bad-{name.replace(' ', '-').lower()}"
    keys = {"ACCESS_KEY": faulty_s3.server.access_key, "SECRET_KEY": faulty_s3.server.secret_key}
    where = {"URL": f"s3://{s3_bucket}/{place}", "ENDPOINT": faulty_s3.endpoint}
    settings({ARCHIVE + each: value for each, value in (where | keys).items()} | case.environ)
    faulty_s3.faults = [Fault("PutObject", times=ALWAYS, **case.faults)] if case.faults else []
    url = http_server.serve("image", images.qcow2())

    words = ("run", "download", "--url", url, "--account", "2", "--id", "7", "--stores", "archive")
    assert_told(case, *said(capsys, *words))

    listed = faulty_s3.server.client().list_objects_v2(Bucket=s3_bucket, Prefix=place)
    assert listed["KeyCount"] == 0


@pytest.mark.parametrize("command", ["submit download --url http://127.0.0.1/x --account 2 --id 7", "jobs", "job x"])
def test_broker_away(command: str, settings: Callable[[Environ], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Without the broker nothing is queued, and the error says so (e2e/test_recovery covers running jobs)."""
    settings({"SSVM_BROKER__URL": "redis://127.0.0.1:{free}/0"})
    status, shown = said(capsys, *command.split())
    assert_told(Case("StoreUnavailable", "broker", 75), status, shown)
