"""The parsers of untrusted bytes. Each target is a function of bytes that may raise only WorkerErrors."""

from __future__ import annotations

import asyncio
import json
import struct
import tarfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from ssvm_worker.artifacts.checksum_files import find_in_sums
from ssvm_worker.artifacts.checksums import Hasher, parse_checksum
from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.cloudstack.command_log import describe
from ssvm_worker.cloudstack.frame import COMPRESSED, HEADER, Frame
from ssvm_worker.cloudstack.messages import decode
from ssvm_worker.errors import WorkerError
from ssvm_worker.formats import Inspection, ova
from ssvm_worker.formats.extents import vmdk_extents
from ssvm_worker.grain_store.map import GrainMap
from ssvm_worker.grain_store.pack import DIGEST_SIZE, digest, find_index
from ssvm_worker.jobs.download.image import unpack
from ssvm_worker.jobs.download.request import Request as DownloadRequest
from ssvm_worker.jobs.request import parse_request, safe_url
from ssvm_worker.net.urls import parse
from ssvm_worker.serve.cloudstack.form import FileForm, boundary_of
from ssvm_worker.serve.cloudstack.ticket import read_ticket
from ssvm_worker.sources.metalink import parse_metalink
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from ssvm_worker.units import MiB
from ssvm_worker.unpacking import tar
from ssvm_worker.unpacking.exact_reader import ExactReader
from ssvm_worker.vmware import ovf
from tests import archives, images
from tests import cloudstack_uploads as uploads
from tests.grain_bench import back_up_grains, packs
from tests.unit.cloudstack.recorded import vectors

from .edits import edited

#: Limit of the unpacked bytes. Above it a download ends with TooLarge.
_MAX_BYTES = 8 * MiB
_TEXT = b"some text, and some more\n" * 40
_OWNER = Owner("job-1", 1)


@dataclass(frozen=True)
class Target:
    """One parser and the first inputs of the fuzzer."""

    #: Raises WorkerErrors for bad bytes.
    run: Callable[[bytes], object]
    #: Valid inputs.
    seeds: tuple[bytes, ...]


def _pieces(data: bytes) -> Iterator[bytes]:
    """Yield the bytes in chunks of growing sizes, so that chunks cross every boundary of the format."""
    start, size = 0, 1
    while start < len(data):
        yield data[start : start + size]
        start, size = start + size, min(size * 7, 65_536)


# --- images ---------------------------------------------------------------------------------------------------------

_IMAGES = (
    images.qcow2(),
    images.qcow2(l1_entry=4 * 4096 | 1 << 63),
    images.qcow2(version=2),
    images.qcow2_backed_by("/etc/passwd"),
    images.qcow2_data_file("/etc/passwd"),
    images.stream_optimized(_TEXT),
    images.vmdk_descriptor(8, createType='"monolithicFlat"', extent='RW 8 FLAT "/etc/passwd" 0'),
    images.vhd_dynamic(),
    images.vhd_dynamic(parent="base.vhd"),
    images.vhd_fixed(images.mbr(65_536)),
    images.vhdx(),
    images.vhdx(parent=True),
    images.iso(),
    images.iso(system_area=images.mbr(4096)),
    images.mbr(65_536),
    images.gpt(65_536),
)


def _inspect(script: bytes) -> None:
    image = _fix_vhd_checksums(edited(script, _IMAGES))
    inspection = Inspection("auto")
    for piece in (image,) if len(image) > MiB else _pieces(image):
        inspection(piece)
    inspection.finish()


def _fix_vhd_checksums(image: bytes) -> bytes:
    """Correct the checksums of a VHD's footers. A parser reads nothing after a wrong checksum."""
    fixed = bytearray(image)
    for start in (0, len(image) - 512):
        if image[start : start + 8] == b"conectix" and start + 512 <= len(image):
            rest = fixed[start : start + 64] + fixed[start + 68 : start + 512]
            struct.pack_into(">I", fixed, start + 64, ~sum(rest) & 0xFFFFFFFF)
    return bytes(fixed)


_CAPACITY = images.GRAIN + 512
_DISKS = (
    images.stream_optimized((_TEXT * 70)[:_CAPACITY]),
    images.stream_optimized(_TEXT[:512].rjust(_CAPACITY, b"\0")),
)


def _stream_optimized(script: bytes) -> None:
    for _ in vmdk_extents(_pieces(edited(script, _DISKS)), "fuzz", _CAPACITY):
        pass


# --- wrappings ------------------------------------------------------------------------------------------------------

_WRAPPED = (
    *(compress(_TEXT) for compress in archives.COMPRESS.values()),
    archives.xz_with_dictionary(1 << 20),
    archives.zstd_with_window(20),
    archives.zip_of(_TEXT),
    archives.zip_of(_TEXT, streamed=True),
)


def _unwrap(data: bytes) -> None:
    for _ in unpack(_pieces(data), Hasher(), "fuzz", max_bytes=_MAX_BYTES, max_ratio=10_000).chunks:
        pass


_TARS = (
    archives.tar_by_library({"vm.ovf": archives.ovf_of("d.vmdk"), "d.vmdk": _TEXT}, tarfile.USTAR_FORMAT),
    archives.tar_by_library({"n" * 120: _TEXT, "b": b""}, tarfile.GNU_FORMAT),
    archives.tar_by_library({"n" * 120: _TEXT}, tarfile.PAX_FORMAT),
)


def _tar(script: bytes) -> None:
    archive = bytearray(edited(script, _TARS))
    for start in range(0, len(archive) - 511, 512):
        if archive[start + 257 : start + 262] == b"ustar":  # correct the checksum, so that the parser reads on
            archive[start + 148 : start + 156] = b" " * 8
            archive[start + 148 : start + 156] = b"%06o\0 " % sum(archive[start : start + 512])
    for member in tar.members(ExactReader(_pieces(bytes(archive))), "fuzz"):
        for _ in member.chunks:
            pass


# --- texts ----------------------------------------------------------------------------------------------------------

_OVF = archives.ovf_of("a.vmdk", "b.vmdk", others=("nvram",))
_METALINK = (
    b'<metalink xmlns="urn:ietf:params:xml:ns:metalink"><file name="x"><size>7</size><hash type="sha-256">'
    + b"0" * 64
    + b'</hash><url priority="1">http://a.example/x</url></file></metalink>'
)


def _ovf(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    ovf.networks_of(text)
    ovf.lists_files(text, [])
    ova.read_sizes(data, "fuzz")
    names = ova.read_descriptor(data, "fuzz")
    ova.renamed(data, {name: f"new{n}" for n, name in enumerate((*names.disks, *names.others))}, "fuzz")


def _sums(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with suppress(WorkerError):
        parse_checksum(text)
    find_in_sums(text, "image", "fuzz")


def _url(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    parse(text)
    safe_url(text)


# --- objects of a store ---------------------------------------------------------------------------------------------

_STORE = MemoryStore("fuzz")
_MANIFEST = back_up_grains(_STORE, "b1", {0: 1, 1: 2, 2: 1})
_MAP_KEY = _MANIFEST.artifact.key(_MANIFEST.entries[0].name)
_MAP = read_bytes(_STORE, _MAP_KEY)
_PACK = read_bytes(_STORE, packs(_STORE)[0])
#: A map has a head, the digest of the head, and the deflated runs.
_HEAD = next(_MAP[:at] for at in range(len(_MAP)) if digest(_MAP[:at]) == _MAP[at : at + DIGEST_SIZE])


def _map(script: bytes) -> None:
    """Take the runs from the script, after an edited head with a correct digest."""
    store = MemoryStore("fuzz")
    runs_at = 1 + script[0] % 32 if script else 0
    head = edited(script[:runs_at], (_HEAD,))
    put_bytes(store, "m", head + digest(head) + zlib.compress(script[runs_at:]), _OWNER)
    for _ in GrainMap(store, "m").runs():
        pass


def _pack(script: bytes) -> None:
    store = MemoryStore("fuzz")
    data = edited(script, (_PACK,))
    put_bytes(store, "p", data, _OWNER)
    find_index(store, "p", len(data))


# --- frames of a management server ----------------------------------------------------------------------------------

_FRAMES = tuple(frame.frame().encode() for frame, _ in vectors().values())


def _frame(script: bytes) -> None:
    """Decode an edited frame with its correct size, then its messages, and log and answer them."""
    data = bytearray(edited(script, _FRAMES))
    if len(data) > HEADER.size and not data[3] & COMPRESSED:
        struct.pack_into(">i", data, 12, len(data) - HEADER.size)
    frame = Frame.decode(bytes(data))
    for each in frame.messages:
        describe(each)
        with suppress(WorkerError):
            repr(decode(each))
    frame.answered(frame.messages).encode()


# --- browser uploads ------------------------------------------------------------------------------------------------

_FORM, _FORM_TYPE = uploads.form(_TEXT, other="a value")
_METADATA = json.dumps(uploads.metadata(checksum="0" * 32)).encode()


def _form(script: bytes) -> None:
    """Read the file of an edited form. It never has more bytes than the form."""
    body = edited(script, (_FORM,))

    async def chunks() -> AsyncIterator[bytes]:
        for each in _pieces(body):
            yield each

    async def read() -> int:
        return sum([len(each) async for each in FileForm(boundary_of(_FORM_TYPE)).file(chunks())])

    with suppress(HTTPException):
        assert asyncio.run(read()) <= len(body)


def _upload_parameters(script: bytes) -> None:
    """Read edited metadata with a valid signature, and make the request of the job."""
    url = f"http://192.0.2.77/upload/{uploads.UUID}"
    headers = uploads.parameters(url, edited(script, (_METADATA,)))
    permit = read_ticket(
        uploads.KEY, uploads.UUID, {name.lower(): value for name, value in headers.items()}, [url], time.time()
    )
    parse_request(DownloadRequest, permit.request("primary"), "download")


def _upload_headers(script: bytes) -> None:
    """Read edited headers: without the key, none is valid."""
    values = script.decode("latin-1").split("\n")[:3]
    headers = dict(zip(("x-signature", "x-metadata", "x-expires"), values, strict=False))
    boundary = "".join(values)
    with suppress(HTTPException):
        boundary_of(boundary)
    read_ticket(uploads.KEY, uploads.UUID, headers, ["http://192.0.2.77/upload/x"], time.time())
    raise AssertionError("headers without a valid signature are accepted")


def _manifest(data: bytes) -> None:
    Manifest.from_json(data, "fuzz")


def _scripts(originals: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return scripts for each image, without edits and with one edit."""
    return tuple(bytes([n]) + more for n in range(len(originals)) for more in (b"", b"\0\0\x08\x03\0\0\0\x03"))


TARGETS = {
    "images": Target(_inspect, _scripts(_IMAGES)),
    "streamoptimized": Target(_stream_optimized, _scripts(_DISKS)),
    "wrappings": Target(_unwrap, _WRAPPED),
    "tar": Target(_tar, _scripts(_TARS)),
    "ovf": Target(_ovf, (_OVF,)),
    "mf": Target(lambda data: ova.read_checksums(data, "fuzz"), (archives.mf_of({"a": b"1", "b": b"2"}),)),
    "metalink": Target(lambda data: parse_metalink(data.decode("utf-8", "replace"), "fuzz"), (_METALINK,)),
    "sums": Target(_sums, (b"0" * 64 + b"  image\n", b"SHA256 (image) = " + b"a" * 64, b"{SHA-256}" + b"1" * 64)),
    "url": Target(_url, (b"https://user@host.example:8080/a/b.qcow2?x=1#y", b"http://[::1%25eth0]/", b"ftp://h/%zz")),
    "manifest": Target(_manifest, (_MANIFEST.to_json(),)),
    "map": Target(_map, (b"\0\0\2\0\0\0\1\0\1",)),
    "frame": Target(_frame, _scripts(_FRAMES)),
    "form": Target(_form, _scripts((_FORM,))),
    "uploadparameters": Target(_upload_parameters, _scripts((_METADATA,))),
    "uploadheaders": Target(
        _upload_headers, (b"c2ln\nbWV0YQ==\n2026-11-28T19:19:39.520Z", b"multipart/form-data; boundary=a")
    ),
    "pack": Target(_pack, _scripts((_PACK,))),
}
