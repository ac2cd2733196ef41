"""verify and delete: damage is found and named, deletion is complete and repeatable, and neighbours are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.file.store import FileStore
from tests import images
from tests.attempts import attempt
from tests.servers.http import HttpServer

IMAGE = images.mbr(2 << 20)


@pytest.fixture
def store(http_server: HttpServer, tmp_path: Path) -> FileStore:
    """Return a directory store with two templates, of which one id is a prefix of the other."""
    store = FileStore("primary", tmp_path)
    for id_ in ("2", "20"):
        fields = {"url": http_server.serve("image", IMAGE), "account": "2", "id": id_}
        download.run(parse_request(download.Request, fields, "download"), attempt(store))
    return store


def asked(job: Any, **fields: Any) -> Any:
    return parse_request(job.Request, {"account": "2", "id": "2"} | fields, "test")


def test_verify_finds_nothing(store: FileStore) -> None:
    """An unchanged artifact passes, and the result has the number of bytes read."""
    result = verify.run(asked(verify), attempt(store))

    assert result["objects"] == 2
    assert result["bytes"] > len(IMAGE)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param(lambda file: file.write_bytes(IMAGE[:-1] + b"!"), "instead of sha256", id="one byte other"),
        pytest.param(lambda file: file.write_bytes(IMAGE[:-1]), "bytes instead of", id="one byte short"),
        pytest.param(lambda file: file.unlink(), "is missing", id="missing"),
    ],
)
def test_verify_names_the_damage(store: FileStore, tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    """Damage is an error that names the object and the difference."""
    harm(tmp_path / "template/tmpl/2/2/2.raw")

    with pytest.raises(CorruptImage, match=rf"1 of 2 objects.*template/tmpl/2/2/2\.raw.*{said}"):
        verify.run(asked(verify), attempt(store))


@pytest.mark.parametrize("job", [verify, delete, download])
def test_one_store(job: Any) -> None:
    """``store`` counts as a list of one, and may not be combined with ``stores``."""
    url = {"url": "https://images.example/a"} if job is download else {}
    assert asked(job, store="archive", **url).stores == ["archive"]
    with pytest.raises(InvalidRequest, match="store: unknown"):
        asked(job, store="archive", stores=["primary"], **url)


def test_verify_of_nothing(store: FileStore) -> None:
    """A missing artifact cannot pass."""
    with pytest.raises(ObjectNotFound):
        verify.run(asked(verify, id="3"), attempt(store))


def test_delete_is_whole_and_touches_no_neighbour(store: FileStore, tmp_path: Path) -> None:
    """A deletion deletes every object and the directory of template 2, and nothing of template 20."""
    delete.run(asked(delete), attempt(store))

    assert not (tmp_path / "template/tmpl/2/2").exists()
    assert [each.key.rpartition("/")[2] for each in store.list("template/tmpl/2/20")] == [
        "20.raw",
        "manifest.json",
        "template.properties",
    ]


def test_delete_twice(store: FileStore) -> None:
    """The deletion of a missing artifact succeeds."""
    delete.run(asked(delete), attempt(store))

    assert delete.run(asked(delete), attempt(store))["deleted"] == {"primary": 0}
