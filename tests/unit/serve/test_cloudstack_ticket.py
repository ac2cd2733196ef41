"""The parameters of a browser upload: those of a real server are read, and all others are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.serve.cloudstack.ticket import UploadPermit, read_ticket
from ssvm_worker.units import GiB
from tests.cloudstack_uploads import KEY, UUID, metadata, parameters
from tests.unit.cloudstack.recorded import DATA

URL = f"https://192.0.2.77/upload/{UUID}"
RECORDED = json.loads((DATA / "vectors/upload-params.json").read_text())


def read(headers: dict[str, str], *urls: str, key: str = KEY, now: float = 0) -> UploadPermit:
    return read_ticket(key, UUID, {name.lower(): each for name, each in headers.items()}, urls or [URL], now)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda each: each["api"]["id"])
def test_recorded(recorded: dict[str, Any]) -> None:
    """The parameters of a real server are decrypted to the recorded text."""
    api = recorded["api"]
    headers = {"x-signature": api["signature"], "x-metadata": api["metadata"], "x-expires": api["expires"]}
    ticket = read_ticket(recorded["psk"], api["id"], headers, ["http://x/", api["postURL"]], now=0)
    assert ticket.fields == json.loads(recorded["metadata_plain"])
    assert ticket.prefix in ("template/tmpl/1/217", "volumes/1/3")


def test_request() -> None:
    """The fields become a download job with the limits of the management server."""
    fields = metadata(maxUploadSize="2", defaultMaxSecondaryStorageInGB=7, checksum="d41d8cd98f00b204e9800998ecf8427e")
    assert read(parameters(URL, fields)).request("cs-1") == {
        "url": f"upload:{UUID}",
        "kind": "template",
        "account": "1",
        "id": "217",
        "name": "up2",
        "unique_name": fields["name"],
        "keep_package": True,
        "format": "raw",
        "checksum": fields["checksum"],
        "stores": ["cs-1"],
        "max_bytes": 2 * GiB,
        "quota": str(7 * GiB),
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"X-signature": "AAAA"}, "signature"),
        ({"X-expires": "2999-01-01T00:00:00.000Z"}, "signature"),
        ({"X-metadata": "AAAA"}, "signature"),
        ({"X-metadata": "x" * 40000}, "too long"),
        ({"X-signature": ""}, "lacks"),
    ],
)
def test_changed(change: dict[str, str], reason: str) -> None:
    """A changed signature, time or text is refused."""
    with pytest.raises(InvalidRequest, match=reason):
        read(parameters(URL, metadata()) | change)


def test_other_url() -> None:
    """A signature for another host or another upload is refused."""
    with pytest.raises(InvalidRequest, match="signature"):
        read(parameters("https://192.0.2.78/upload/" + UUID, metadata()))


def test_expired() -> None:
    """Valid parameters are refused after their time."""
    with pytest.raises(InvalidRequest, match="expired"):
        read(parameters(URL, metadata(), seconds=0), now=1e11)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (metadata(entityUUID="other"), "another upload"),
        (metadata(absolutePath="template/tmpl/../../etc"), "prefix"),
        (metadata(absolutePath="/etc"), "prefix"),
        (metadata(absolutePath=None), "incomplete"),
        (metadata(dataTo=None), "incomplete"),
        (metadata(maxUploadSize="many"), "incomplete"),
        ([], "not an object"),
    ],
)
def test_unfit_metadata(fields: Any, reason: str) -> None:
    """Signed metadata is refused if it names no artifact or is incomplete."""
    with pytest.raises(InvalidRequest, match=reason):
        read(parameters(URL, fields))


def test_other_encryption() -> None:
    """Metadata that this key does not decrypt is refused."""
    headers = parameters(URL, metadata(), key="another key")
    foreign = parameters(URL, metadata())
    with pytest.raises(InvalidRequest, match="signature"):
        read(headers | {"X-signature": foreign["X-signature"]})
