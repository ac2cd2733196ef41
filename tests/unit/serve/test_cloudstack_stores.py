"""Image stores that a management server has named: the service finds them in the ledger, also after its start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.config.schema import SERVER_PREFIX
from ssvm_worker.ledger.links import server_link
from ssvm_worker.wiring import assembly
from ssvm_worker.wiring.server_names import server_names
from tests import images
from tests.cloudstack_uploads import DIRECTORY, KEY, STORE_URL, UUID, post, signed
from tests.servers.service import Service
from tests.unit.serve.test_cloudstack_links import IMAGE, PATH, allow, login, publish

NAME = f"{SERVER_PREFIX}1"
OBJECT = "template/tmpl/2/202/a.qcow2"


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    return start_service(cloudstack=True)


@pytest.fixture
def export(service: Service, tmp_path: Path) -> Path:
    """The directory of a store that an agent names after the start of the service."""
    found = tmp_path / "export"
    (found / OBJECT).parent.mkdir(parents=True)
    (found / OBJECT).write_bytes(IMAGE)
    server_names(service.settings).put_store(NAME, {"url": f"file://{found}", "shared": True})
    web = assembly.open_cloudstack_web(service.settings)
    web.add_store(STORE_URL, DIRECTORY, NAME)
    web.set_upload_key(KEY)
    return found


def test_upload(service: Service, export: Path) -> None:
    """A browser's upload goes to the store, and all users may read its file."""
    image = images.mbr(3 << 20)
    assert post(service, image, signed(service)).data == b"upload successful."
    file = export / "template/tmpl/1/217/217.raw"
    assert (file.read_bytes() == image, oct(file.stat().st_mode)[-3:]) == (True, "644")
    assert not list(service.store.rglob("*.raw"))


def test_refused_upload(service: Service, export: Path) -> None:
    """A refused upload leaves nothing on the store."""
    assert post(service, images.mbr(3 << 20), signed(service, imageFormat="QCOW2")).status == 422
    assert [each.name for each in export.rglob("*") if each.is_file()] == ["a.qcow2"]
    with assembly.open_ledger(service.settings) as ledger:
        assert ledger.get(server_link(UUID)).state == "failed"


def test_link_and_copy(service: Service, export: Path) -> None:
    """A link and a copy give an object of the store."""
    allow(service, "127.0.0.1")
    assert service.request("GET", publish(service, PATH, OBJECT, store=NAME)).data == IMAGE
    assert service.request("GET", f"/copy/SecStorage/{DIRECTORY}/{OBJECT}", headers=login()).data == IMAGE


def test_forgotten_store(service: Service) -> None:
    """A link to a store that is not known gives nothing."""
    assert service.request("GET", publish(service, PATH, OBJECT, store=f"{SERVER_PREFIX}2")).status == 404


def test_moved_store(service: Service, export: Path, tmp_path: Path) -> None:
    """If the management server changes the settings of a store, the service opens it again."""
    at = publish(service, PATH, OBJECT, store=NAME)
    assert service.request("GET", at).status == 200
    moved = export.rename(tmp_path / "moved")
    server_names(service.settings).put_store(NAME, {"url": f"file://{moved}"})
    assert service.request("GET", at).data == IMAGE
