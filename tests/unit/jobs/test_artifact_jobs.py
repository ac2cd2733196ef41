"""verify and delete: damage is found and named, deletion is whole and safe to repeat, neighbours are untouched."""

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
    """A directory with two templates, the id of one of them the beginning of the other's."""
    store = FileStore("primary", tmp_path)
    for id_ in ("2", "20"):
        fields = {"url": http_server.serve("image", IMAGE), "account": "2", "id": id_}
        download.run(parse_request(download.Request, fields, "download"), attempt(store))
    return store


def asked(job: Any, **fields: Any) -> Any:
    return parse_request(job.Request, {"account": "2", "id": "2"} | fields, "test")


def test_verify_finds_nothing(store: FileStore) -> None:
    """An artifact that is as it was stored passes, and the result says how much was read."""
    result = verify.run(asked(verify), attempt(store))

    assert result["objects"] == 2
    assert result["bytes"] > len(IMAGE)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        pytest.param(lambda file: file.write_bytes(IMAGE[:-1] + b"!"), "in place of sha256", id="one byte other"),
        pytest.param(lambda file: file.write_bytes(IMAGE[:-1]), "bytes in place of", id="one byte short"),
        pytest.param(lambda file: file.unlink(), "is missing", id="missing"),
    ],
)
def test_verify_names_the_damage(store: FileStore, tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    """Damage is an error that names the object and what differs."""
    harm(tmp_path / "template/tmpl/2/2/2.raw")

    with pytest.raises(CorruptImage, match=rf"1 of 2 objects.*template/tmpl/2/2/2\.raw.*{said}"):
        verify.run(asked(verify), attempt(store))


@pytest.mark.parametrize("job", [verify, delete, download])
def test_one_store(job: Any) -> None:
    """``store`` is understood as a list of one; both at once are not."""
    url = {"url": "https://images.example/a"} if job is download else {}
    assert asked(job, store="archive", **url).stores == ["archive"]
    with pytest.raises(InvalidRequest, match="store: unknown"):
        asked(job, store="archive", stores=["primary"], **url)


def test_verify_of_nothing(store: FileStore) -> None:
    """An artifact that is not there cannot pass."""
    with pytest.raises(ObjectNotFound):
        verify.run(asked(verify, id="3"), attempt(store))


def test_delete_is_whole_and_touches_no_neighbour(store: FileStore, tmp_path: Path) -> None:
    """Deleting takes every object of the artifact, its directory too, and nothing of 20 when 2 is meant."""
    delete.run(asked(delete), attempt(store))

    assert not (tmp_path / "template/tmpl/2/2").exists()
    assert [each.key.rpartition("/")[2] for each in store.list("template/tmpl/2/20")] == [
        "20.raw",
        "manifest.json",
        "template.properties",
    ]


def test_delete_twice(store: FileStore) -> None:
    """What is not there is deleted with success."""
    delete.run(asked(delete), attempt(store))

    assert delete.run(asked(delete), attempt(store))["deleted"] == {"primary": 0}
