"""``ssvm doctor --cloudstack`` with a simulated server, and one fault at a time."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.cli import main
from ssvm_worker.cloudstack.examination import examine_agent
from ssvm_worker.cloudstack.guid_claim import GuidClaim
from ssvm_worker.config.schema import Settings
from ssvm_worker.demo.cloudstack.authority import IssuedCertificate, RootAuthority
from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.operations.doctor import Finding
from ssvm_worker.wiring.assembly import open_agents
from ssvm_worker.wiring.server_names import server_names
from tests.servers.agent import section_for
from tests.servers.broker import Broker
from tests.waiting import CLAIM_S

#: Nothing listens there, so no server sends its time.
_NO_WEB = 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """A server with strict mode, as new installations have it."""
    with make_management_server(tmp_path / "ca") as server:
        server.strict = True
        yield server


def files(issued: IssuedCertificate) -> dict[str, Any]:
    """Return the keys of [cloudstack] for these files."""
    return {
        "ca_file": str(issued.ca),
        "certificate_file": str(issued.certificate),
        "key_file": str(issued.key),
    }


def settings_of(server: ManagementServer, broker: Broker, tmp_path: Path, **values: Any) -> Settings:
    """Return the settings of an agent of that server, with a directory for the stores of the server."""
    (tmp_path / "store").mkdir(exist_ok=True)
    given = {
        "state_dir": str(tmp_path / "state"),
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "stores": {"primary": {"url": f"file://{tmp_path / 'store'}"}},
        "cloudstack": section_for(server, stores={"nfs://192.0.2.10/export/sec1": "primary"}) | values,
    }
    if values.keys() & {"ca_file", "insecure"}:
        given["cloudstack"].pop("fingerprint")
    return config.parse(given, "the test")


def examine(settings: Settings, **given: Any) -> dict[str, Finding]:
    """Return the findings by the first word of their check; of several, the last one."""
    return {each.check.split()[0]: each for each in examine_agent(settings, **({"web_port": _NO_WEB} | given))}


def state(finding: Finding) -> str:
    """Return ok, warning or failed."""
    return str(finding.as_dict()["state"])


def test_all_is_well(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """With the right certificate at a strict server, no check fails or warns, except about public links."""
    settings = settings_of(server, broker, tmp_path, **files(server.authority.issue("127.0.0.1")))
    with clock(0) as port:
        found = examine(settings, web_port=port)
    assert {name: state(each) for name, each in found.items()} == {
        "server": "ok",
        "trust": "ok",
        "certificate": "ok",
        "clock": "ok",
        "guid": "ok",
        "store": "ok",
        "links": "warning",
    }
    assert server.zone.hosts == []


def test_no_server() -> None:
    """Without [cloudstack] one finding says what to set."""
    (finding,) = examine_agent(config.parse({}, "the test"))
    assert (finding.ok, "--from-cmdline" in finding.detail) == (False, True)


def test_unreachable(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A server that refuses connections fails with the port, and the other checks continue."""
    settings = settings_of(server, broker, tmp_path, **files(server.authority.issue("127.0.0.1")))
    server.stop()
    found = examine(settings)
    assert state(found["server"]) == "failed"
    assert f"port {server.port} cannot be reached: Connection refused" in found["server"].detail
    assert (state(found["certificate"]), state(found["store"])) == ("warning", "ok")


def test_another_service(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A port without TLS fails with the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            accepted, _ = listener.accept()
            accepted.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            accepted.close()

        threading.Thread(target=answer, daemon=True).start()
        settings = settings_of(server, broker, tmp_path, port=listener.getsockname()[1])
        found = examine(settings)
    assert state(found["server"]) == "failed"
    assert "agents' port" in found["server"].detail


def test_no_certificate(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """Without a certificate a strict server fails, and a server that is not strict gives a warning."""
    settings = settings_of(server, broker, tmp_path)
    found = examine(settings)
    assert (state(found["server"]), state(found["certificate"])) == ("failed", "failed")
    assert "strictness" in found["server"].detail
    assert "issueCertificate ipaddress=127.0.0.1" in found["certificate"].detail
    server.strict = False
    found = examine(settings)
    assert (state(found["server"]), state(found["certificate"])) == ("ok", "warning")


def test_missing_files(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """Files that do not exist yet are named."""
    names = {each: str(tmp_path / each) for each in ("ca_file", "certificate_file", "key_file")}
    found = examine(settings_of(server, broker, tmp_path, **names))
    assert (state(found["trust"]), state(found["certificate"])) == ("failed", "failed")
    assert names["ca_file"] in found["trust"].detail
    assert names["certificate_file"] in found["certificate"].detail
    assert names["key_file"] in found["certificate"].detail


def fault(server: ManagementServer, tmp_path: Path, name: str) -> IssuedCertificate:
    """Return a certificate with that fault, and the right file of the authority."""
    issued = server.authority.issue("127.0.0.1")
    if name == "address":
        return server.authority.issue("192.0.2.1")
    if name == "expired":
        return server.authority.issue("127.0.0.1", days=-1)
    if name == "soon":
        return server.authority.issue("127.0.0.1", days=5)
    if name == "future":
        return server.authority.issue("127.0.0.1", days=365, starts_in_days=2)
    if name == "key":
        issued.key.write_bytes(server.authority.issue("127.0.0.1").key.read_bytes())
    elif name == "damaged":
        issued.certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    elif name == "issuer":
        (tmp_path / "other").mkdir()
        foreign = RootAuthority(tmp_path / "other").issue("127.0.0.1")
        return IssuedCertificate(foreign.certificate, foreign.key, issued.ca)
    return issued


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("address", "it names 192.0.2.1, s-1-VM, but this host connects from 127.0.0.1", "failed"),
        ("expired", "it has expired on", "failed"),
        ("soon", "it expires on", "warning"),
        ("future", "Set the clock", "failed"),
        ("key", "is not its key", "failed"),
        ("damaged", "contains no PEM certificate", "failed"),
        ("issuer", "is not the server's authority CN=ca.cloudstack.apache.org sha256:", "failed"),
    ],
)
def test_wrong_certificate(
    server: ManagementServer, broker: Broker, tmp_path: Path, name: str, words: str, expected: str
) -> None:
    """Each fault of the certificate is named with its remedy, next to the server's refusal."""
    server.allow_expired = False
    found = examine(settings_of(server, broker, tmp_path, **files(fault(server, tmp_path, name))))
    assert words in found["certificate"].detail
    assert state(found["certificate"]) == expected, found["server"]
    assert state(found["server"]) == ("ok" if expected == "warning" else "failed")


def test_other_authority(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A server with another authority than that of ca_file fails, with both fingerprints."""
    (tmp_path / "other").mkdir()
    other = RootAuthority(tmp_path / "other")
    server.strict = False
    found = examine(settings_of(server, broker, tmp_path, ca_file=str(other.certificate_file)))
    assert state(found["server"]) == "failed"
    assert server.authority.fingerprint in found["server"].detail
    assert "update ca_file" in found["server"].detail


def test_insecure(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """Trust in every server is a warning."""
    server.strict = False
    found = examine(settings_of(server, broker, tmp_path, insecure=True))
    assert (state(found["server"]), state(found["trust"])) == ("ok", "warning")


@contextmanager
def clock(offset_s: float) -> Iterator[int]:
    """Run a web interface whose clock is wrong, and return its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(302)
            self.send_header("Date", format_datetime(datetime.fromtimestamp(time.time() + offset_s, UTC)))
            self.end_headers()

    web = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.handle_request, daemon=True).start()
    yield web.server_port
    web.server_close()


@pytest.mark.parametrize(("offset_s", "expected"), [(0, "ok"), (-86400, "warning"), (86400, "warning")])
def test_clock(server: ManagementServer, broker: Broker, tmp_path: Path, offset_s: float, expected: str) -> None:
    """A server's clock that differs by a day is a warning that says which clock is ahead."""
    with clock(offset_s) as port:
        finding = examine(settings_of(server, broker, tmp_path), web_port=port)["clock"]
    assert state(finding) == expected
    assert ("ahead of" in finding.detail, "behind" in finding.detail) == (offset_s < 0, offset_s > 0)


def test_unknown_clock(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """If no server shows its time, a warning says that the clocks were not compared."""
    finding = examine(settings_of(server, broker, tmp_path))["clock"]
    assert (state(finding), "not compared" in finding.detail) == ("warning", True)


@pytest.mark.parametrize("content", ["", "-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n"])
def test_trust_without_certificate(server: ManagementServer, broker: Broker, tmp_path: Path, content: str) -> None:
    """A ca_file without a usable certificate is a failure, also if no server can be reached."""
    (tmp_path / "odd.crt").write_text(content)
    server.stop()
    finding = examine(settings_of(server, broker, tmp_path, ca_file=str(tmp_path / "odd.crt")))["trust"]
    assert (state(finding), str(tmp_path / "odd.crt") in finding.detail) == ("failed", True)


def test_guid(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """The holder of the GUID is named, and an agent that a server replaced just after Up is a failure."""
    settings = settings_of(server, broker, tmp_path)
    claim = GuidClaim(open_agents(settings), "s-1-VM", "z", CLAIM_S)
    claim.start()
    try:
        assert claim.wait(threading.Event())
        held = examine(settings)["guid"]
        assert (state(held), "holds it, not Up" in held.detail) == ("warning", True)
        claim.describe("192.0.2.2:8250", 7)
        claim.note_replaced()
        claim.note_unanswered(())
        registry = open_agents(settings)
        while registry.agents()[0].info.replaced_at is None:
            time.sleep(0.02)
        rows = [each for each in examine_agent(settings, web_port=_NO_WEB) if each.check == "guid"]
    finally:
        claim.release()
    assert [state(each) for each in rows] == ["ok", "failed"]
    assert "Up at 192.0.2.2:8250 as host 7" in rows[0].detail
    assert "Stop the Java agent" in rows[1].detail


def test_stores(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """A store of a server that cannot be mounted fails by its URL. A store that is mapped to another is not opened."""
    settings = settings_of(server, broker, tmp_path)
    server_names(settings).put_store("cs-0123456789abcdef", {"url": "nfs://127.0.0.1:1/export", "shared": True})
    old = {"url": "nfs://192.0.2.10/export/sec1?vers=4.1", "shared": True}
    server_names(settings).put_store("cs-0000000000000000", old)
    rows = {each.check: each for each in examine_agent(settings, web_port=_NO_WEB, store_s=CLAIM_S)}
    assert state(rows["store primary"]) == "ok"
    assert state(rows["store cs-0123456789abcdef"]) == "failed"
    assert rows["store cs-0123456789abcdef"].detail.startswith("nfs://127.0.0.1:1/export: ")
    assert "store cs-0000000000000000" not in rows


def test_no_store(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """Before the first setup, the missing stores are a warning."""
    found = examine(settings_of(server, broker, tmp_path, stores={}))
    assert state(found["stores"]) == "warning"


def test_public_address(server: ManagementServer, broker: Broker, tmp_path: Path) -> None:
    """The address that users get in download links is printed."""
    found = examine(settings_of(server, broker, tmp_path, public={"address": "192.0.2.77"}))
    assert (state(found["links"]), "http://192.0.2.77/userdata/" in found["links"].detail) == ("ok", True)


def test_command(server: ManagementServer, broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a row for each check as JSON, and its status is 1 if one fails."""
    file = tmp_path / "agent.properties"
    file.write_text(f"guid=s-1-VM\nhost={server.host}\nport={server.port}\nzone=1\n")
    settings = tmp_path / "worker.toml"
    settings.write_text(f'[broker]\nurl = "{broker.url}"\nprefix = "{broker.prefix}"\n')
    arguments = ["doctor", "--cloudstack", "--properties", str(file), "--config", str(settings), "--json"]
    assert main(arguments) == 1
    rows = json.loads(capsys.readouterr().out)
    assert {"check", "ok", "state", "detail"} == rows[0].keys()
    assert str(tmp_path / "cloud.ca.crt") in next(each["detail"] for each in rows if each["check"] == "trust")
    assert main(["doctor", "--properties", str(file)]) == 2
