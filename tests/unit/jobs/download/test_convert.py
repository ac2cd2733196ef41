"""Conversion: only of checked images, within limits, with a checked result, and without leftovers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import (
    Cancelled,
    ConfigError,
    CorruptImage,
    InvalidRequest,
    TooLarge,
    UnknownFormat,
    UnsafeImage,
)
from ssvm_worker.formats.qemu_img import QemuImg, tool
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.download import convert
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from tests import images
from tests.archives import COMPRESS, ova_of, ovf_of
from tests.attempts import attempt
from tests.neighbours import missing
from tests.servers.http import HttpServer

MIB = 1 << 20
DISK = random.Random(7).randbytes(MIB) + bytes(6 * MIB) + random.Random(8).randbytes(MIB)


@pytest.fixture(autouse=True)
def qemu() -> None:
    """Skip the test without qemu-img."""
    if not shutil.which("qemu-img"):
        missing("qemu-img", "install qemu-utils")


@pytest.fixture
def trying(tmp_path: Path) -> Attempt:
    """Return an attempt with a store and a scratch directory."""
    for name in ("store", "scratch"):
        (tmp_path / name).mkdir()
    return attempt(
        FileStore("primary", tmp_path / "store"), settings={"download": {"scratch_dir": tmp_path / "scratch"}}
    )


def request(url: str, **fields: Any) -> download.Request:
    asked = {"url": url, "account": 2, "id": "7", "convert_to": "qcow2"} | fields
    return parse_request(download.Request, asked, "download")


def made(folder: Path, options: str, disk: bytes = DISK) -> bytes:
    """Return qemu-img's conversion of a raw disk."""
    (folder / "disk").write_bytes(disk)
    subprocess.run(["qemu-img", "convert", "-f", "raw", *options.split(), "disk", "made"], cwd=folder, check=True)
    return (folder / "made").read_bytes()


def left(folder: Path) -> list[str]:
    """Return the files of the scratch directory and of the store, except complete artifacts."""
    return [each.name for each in (folder / "scratch").rglob("*")] + [
        each.name for each in (folder / "store").rglob("*") if each.is_file()
    ]


@pytest.mark.parametrize(
    ("options", "to"),
    [
        ("-O qcow2 -c", "raw"),
        ("-O vmdk", "vmdk"),
        ("-O vmdk -o subformat=streamOptimized", "qcow2"),
        ("-O vpc", "qcow2"),
        ("-O vpc -o subformat=fixed", "vmdk"),
        ("-O vhdx", "raw"),
        ("-O raw", "qcow2"),
        ("-O raw", "raw"),
    ],
)
def test_converts(http_server: HttpServer, tmp_path: Path, trying: Attempt, options: str, to: str) -> None:
    """Every disk format converts to every target with equal content, and the manifest has the original format."""
    original = made(tmp_path, options)

    result = download.run(request(http_server.serve("x", original), convert_to=to), trying)

    image = tmp_path / "store" / result["key"]
    assert (result["format"], image.name) == (to, f"7.{to}")
    compared = ["qemu-img", "compare", "-f", "raw", "-F", to, tmp_path / "disk", image]
    assert b"identical" in subprocess.run(compared, check=False, capture_output=True).stdout
    entry = read_manifest(trying.store("primary"), request("http://x").artifact).entries[0]
    assert entry.digest == f"sha256:{hashlib.sha256(image.read_bytes()).hexdigest()}"
    assert entry.facts["converted_from"]["digest"] == f"sha256:{hashlib.sha256(original).hexdigest()}"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_compressed_and_checked(http_server: HttpServer, tmp_path: Path, trying: Attempt) -> None:
    """A compressed image is converted too, and the checksum is that of the original file."""
    offered = COMPRESS["gzip"](made(tmp_path, "-O vmdk -o subformat=streamOptimized"))
    checksum = hashlib.sha256(offered).hexdigest()
    result = download.run(request(http_server.serve("x", offered), checksum=checksum), trying)
    assert (result["format"], result["virtual_size"]) == ("qcow2", len(DISK))
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", tmp_path / "store" / result["key"]], capture_output=True
    )
    assert json.loads(told.stdout)["virtual-size"] == len(DISK)


def test_progress(http_server: HttpServer, tmp_path: Path, trying: Attempt) -> None:
    """Progress shows the stage and its share."""
    seen: list[dict[str, Any]] = []
    trying.progress._publish = seen.append
    download.run(request(http_server.serve("x", made(tmp_path, "-O vmdk"))), trying)
    stages = list(dict.fromkeys(each["stage"] for each in seen))
    assert stages == ["connecting", "download", "verifying", "checking", "converting", "storing", "committing"]


def test_asked_again(http_server: HttpServer, tmp_path: Path, trying: Attempt) -> None:
    """An existing converted image answers only the same request."""
    url = http_server.serve("x", made(tmp_path, "-O vmdk"))
    first = download.run(request(url), trying)
    assert download.run(request(url), trying) == first | {"reused": True}
    with pytest.raises(InvalidRequest, match="another template under this id"):
        download.run(request(url, convert_to="raw"), trying)


def test_unsafe_is_not_converted(
    http_server: HttpServer, tmp_path: Path, trying: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qemu-img never reads an image that was not found safe."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for name in ("qemu-img", "prlimit"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n: > {tmp_path}/ran\n")
        (tmp_path / "bin" / name).chmod(0o755)
    with pytest.raises(UnsafeImage, match="backing file"):
        download.run(request(http_server.serve("x", images.qcow2_backed_by("/etc/passwd"))), trying)
    assert not (tmp_path / "ran").exists()
    assert left(tmp_path) == []


def test_damaged_is_not_converted(http_server: HttpServer, tmp_path: Path, trying: Attempt) -> None:
    """An image with wrong tables is found by a check, because its conversion would succeed."""
    image = bytearray(made(tmp_path, "-O qcow2"))
    image[0x20000:0x20008] = bytes(8)  # a refcount block of clusters in use
    with pytest.raises(CorruptImage, match="qemu-img check finds errors"):
        download.run(request(http_server.serve("x", bytes(image)), convert_to="raw"), trying)
    assert left(tmp_path) == []


def test_output_is_judged(http_server: HttpServer, tmp_path: Path, trying: Attempt) -> None:
    """A result is refused if its guest has written another image's header into it."""
    nested = images.qcow2_backed_by("/etc/passwd").ljust(2 * MIB, b"\0")
    url = http_server.serve("x", made(tmp_path, "-O qcow2", nested))
    with pytest.raises(UnknownFormat, match=r"The image is qcow2, but raw was asked for.*converted"):
        download.run(request(url, convert_to="raw"), trying)
    assert left(tmp_path) == []


def test_expansion_bomb(http_server: HttpServer, tmp_path: Path, trying: Attempt) -> None:
    """A qcow2 with 512 references to one compressed cluster may not grow beyond the limit."""
    cluster, packer = 4096, zlib.compressobj(9, wbits=-12)
    packed = (packer.compress(b"x" * cluster) + packer.flush()).ljust(512, b"\0")
    counts, table = struct.pack(">6H", 1, 1, 1, 1, 1, 512), struct.pack(">Q", 1 << 62 | 5 * cluster) * 512
    bomb = images.qcow2(size=2 * MIB, l1_entry=4 * cluster | 1 << 63)
    bomb = images.overlay(bomb, {2 * cluster: counts, 4 * cluster: table, 5 * cluster: packed})
    with pytest.raises(TooLarge, match="that are allowed"):
        download.run(request(http_server.serve("x", bomb), convert_to="raw", max_bytes=MIB), trying)
    assert left(tmp_path) == []


def test_limits(tmp_path: Path) -> None:
    """The kernel enforces the file size limit, and the error names the image."""
    (tmp_path / "disk").write_bytes(b"x" * 70 * MIB)
    lying = QemuImg(tmp_path, MIB, lambda: None, "an image")
    with pytest.raises(TooLarge, match="exceeds the size of a disk"):
        lying.convert(tmp_path / "disk", "raw", "qcow2", tmp_path / "out", lambda _: None)


def test_cancelled(tmp_path: Path) -> None:
    """A cancel ends qemu-img at once."""
    (tmp_path / "disk").write_bytes(b"x" * 50 * MIB)

    def cancel() -> None:
        raise Cancelled("user")

    with pytest.raises(Cancelled):
        QemuImg(tmp_path, 50 * MIB, cancel, "").convert(
            tmp_path / "disk", "raw", "vmdk", tmp_path / "out", lambda _: None
        )


def test_where_it_cannot(http_server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker without a scratch directory or qemu-img says so before it writes."""
    url = http_server.serve("x", images.qcow2())
    with pytest.raises(ConfigError, match="does not convert images"):
        download.run(request(url), attempt())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="qemu-img is not installed"):
        download.run(request(url), attempt(settings={"download": {"scratch_dir": tmp_path}}))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (images.iso(), "The image is iso, which is not converted"),
        (ova_of({"vm.ovf": ovf_of("a"), "a": b""}), "The file is an OVA, which is not converted"),
    ],
    ids=["an ISO", "an OVA"],
)
def test_no_disk(http_server: HttpServer, tmp_path: Path, trying: Attempt, data: bytes, text: str) -> None:
    """An input that is not a single disk is not converted."""
    with pytest.raises(UnknownFormat, match=text):
        download.run(request(http_server.serve("x", data)), trying)
    assert left(tmp_path) == []


def test_dead_workers_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next conversion deletes folders of killed workers, but not folders in use."""
    trying = attempt(MemoryStore("primary"), settings={"download": {"scratch_dir": tmp_path}})
    with convert.converting("raw", trying, "") as alive:
        dead = tmp_path / "ssvm-convert-dead"
        dead.mkdir()
        (dead / "image").write_bytes(b"x")
        for folder in tmp_path.iterdir():
            os.utime(folder, (0, 0))
        with convert.converting("raw", trying, ""):
            assert not dead.exists()
            alive.sink(None).abort()
    assert list(tmp_path.iterdir()) == []


def test_tools_are_found_by_path() -> None:
    """Programs are started by their absolute path."""
    assert tool("prlimit").startswith("/")
