"""Compressed images are unpacked, verified and inspected in one pass."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import unpacking
from ssvm_worker.artifacts.manifest import read_draft, read_manifest
from ssvm_worker.errors import CorruptImage, ImageError, SourceUnavailable, TooLarge, UnknownFormat
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import read_bytes
from tests import images
from tests.archives import COMPRESS, zip_of
from tests.attempts import again, attempt
from tests.servers.http import Behaviour, HttpServer

IMAGE = images.mbr(6 << 20)
NOISY = images.overlay(IMAGE, {1 << 20: images.overlay(b"", {0: hashlib.shake_256(b"x").digest(4 << 20)})})
WRAP = COMPRESS | {"zip": zip_of}
KEY = "template/tmpl/2/7/7.raw"
each_kind = pytest.mark.parametrize("kind", WRAP)


def request(url: str, **fields: Any) -> download.Request:
    return parse_request(download.Request, {"url": url, "account": 2, "id": "7"} | fields, "download")


@each_kind
def test_both_digests(http_server: HttpServer, kind: str) -> None:
    """The checksum is that of the original file, and the manifest has its digest and the image's."""
    store, offered = MemoryStore("primary"), WRAP[kind](IMAGE)
    sum_of_file = hashlib.sha512(offered).hexdigest()

    result = download.run(request(http_server.serve("x", offered), checksum=sum_of_file), attempt(store))

    assert read_bytes(store, KEY) == IMAGE
    assert (result["size"], result["format"]) == (len(IMAGE), "raw")
    assert result["digest"] == f"sha256:{hashlib.sha256(IMAGE).hexdigest()}"
    source = read_manifest(store, request("http://x").artifact).source
    assert source["digests"] == [f"sha256:{hashlib.sha256(offered).hexdigest()}", f"sha512:{sum_of_file}"]
    assert (source["wrapping"], source["size"]) == (kind, len(offered))


def test_the_same_again(http_server: HttpServer) -> None:
    """A compressed image that exists already is recognised by the checksum of its file."""
    store, offered = MemoryStore("primary"), COMPRESS["gzip"](IMAGE)
    asked = request(http_server.serve("x", offered), checksum=hashlib.sha256(offered).hexdigest())
    first = download.run(asked, attempt(store))
    assert download.run(asked, attempt(store)) == first | {"reused": True}


@each_kind
def test_inspected_inside(http_server: HttpServer, kind: str) -> None:
    """The image inside is inspected, and must have the requested format."""
    url, store = http_server.serve("x", WRAP[kind](images.qcow2_backed_by("/etc/passwd"))), MemoryStore("primary")
    with pytest.raises(ImageError, match="names a backing file"):
        download.run(request(url), attempt(store))
    with pytest.raises(UnknownFormat, match="The image is qcow2, but raw was asked for"):
        download.run(request(url, format="raw"), attempt(store))
    assert list(store.list()) == []


def test_resumes_below_the_decoder(http_server: HttpServer) -> None:
    """A broken connection resumes at its byte, unnoticed by the decoder."""
    store, offered = MemoryStore("primary"), COMPRESS["zstandard"](NOISY)
    url = http_server.serve("x", offered, cut_after=2 << 20, cut_times=1)
    assert download.run(request(url), attempt(store))["resumptions"] == 1
    assert read_bytes(store, KEY) == NOISY


def test_the_next_attempt_starts_again(http_server: HttpServer, tmp_path: Path) -> None:
    """Unpacked bytes of an attempt are not kept, because their position in the file is unknown."""
    store, offered = FileStore("primary", tmp_path), COMPRESS["zstandard"](NOISY)
    asked = request(http_server.serve("x", offered, cut_after=2 << 20, then=Behaviour(status=503)))
    with pytest.raises(SourceUnavailable):
        download.run(asked, attempt(store, will_resume=again))
    assert read_draft(store, asked.artifact) is None
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []

    http_server.serve("x", offered)
    assert download.run(asked, attempt(store, token=1))["resumptions"] == 0
    assert read_bytes(store, KEY) == NOISY


def test_a_damaged_stream_over_a_seam_is_tried_once_more(http_server: HttpServer) -> None:
    """A decoding error after a resumption causes one clean start."""
    store, offered = MemoryStore("primary"), COMPRESS["gzip"](NOISY)
    lying = Behaviour(bytes(len(offered)), then=Behaviour(offered))
    url = http_server.serve("x", offered, cut_after=2 << 20, then=lying)
    assert download.run(request(url), attempt(store))["resumptions"] == 0
    assert read_bytes(store, KEY) == NOISY


@each_kind
def test_larger_inside(http_server: HttpServer, kind: str) -> None:
    """The limit applies to the unpacked size too, and nothing is left."""
    store = MemoryStore("primary")
    with pytest.raises(TooLarge, match="that are allowed"):
        download.run(request(http_server.serve("x", WRAP[kind](IMAGE)), max_bytes=5 << 20), attempt(store))
    assert list(store.list()) == []
    assert store.sweep(0) == 0


def test_bomb(http_server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb is refused while it is unpacked."""
    monkeypatch.setattr(unpacking, "UNSUSPICIOUS", 1 << 20)
    url = http_server.serve("x", COMPRESS["bzip2"](bytes(32 << 20)))
    with pytest.raises(TooLarge, match="more than 100 times"):
        download.run(request(url), attempt(settings={"download": {"max_ratio": 100}}))


def test_virtual_size(http_server: HttpServer) -> None:
    """A disk above the configured size is refused, however small its file is."""
    url = http_server.serve("x", images.qcow2())
    with pytest.raises(TooLarge, match="The disk has 1 MiB; 512 KiB are allowed"):
        download.run(request(url), attempt(settings={"download": {"max_virtual_size": 1 << 19}}))


def test_cut_short(http_server: HttpServer) -> None:
    """A truncated file is corrupt, and none of its bytes is kept."""
    store = MemoryStore("primary")
    with pytest.raises(CorruptImage, match="cut short"):
        download.run(request(http_server.serve("x", COMPRESS["xz"](IMAGE)[:-9])), attempt(store))
    assert list(store.list()) == []
