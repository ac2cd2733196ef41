"""What a download is wrapped in, and how it comes off: an image out of its compression, or an OVA's members."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.errors import UnknownFormat
from ssvm_worker.formats.ova import is_descriptor
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.streaming.pipeline import limit, tap
from ssvm_worker.unpacking import peek, recognise, refuse_bomb, refuse_nested, tar, unwrap
from ssvm_worker.unpacking.exact_reader import ExactReader
from ssvm_worker.unpacking.tar import TarMember

_AS_WHAT = "Ask for ova or auto, if this is the file that you mean"


@dataclass(frozen=True)
class DownloadBounds:
    """What may come out of a download."""

    max_bytes: int
    max_ratio: int
    where: str


@dataclass(frozen=True)
class Unpacked:
    """The image, or the members of a package."""

    #: Of the image; nothing for a package.
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    #: What was around the image: gzip, bzip2, xz, zstandard, zip or tar; "" for nothing.
    wrapping: str = ""
    #: Sees the file as offered, where that is not the image itself.
    offered: Hasher | None = None
    #: Of an OVA: its descriptor, then the rest, each to be read before the next.
    members: Iterator[TarMember] | None = None


def unpack(chunks: Iterator[bytes], hasher: Hasher, bounds: DownloadBounds) -> Unpacked:
    """Look at the first bytes, and take off what is around the image. *hasher* will have seen the file as offered."""
    head, chunks = peek(chunks)
    wrapping = recognise(head)
    if not wrapping:
        return Unpacked(chunks)
    chunks = tap(chunks, hasher)
    if wrapping == "tar":
        return _from_tar(chunks, hasher, bounds)
    _, inside = unwrap(chunks, bounds.where)
    inside = refuse_bomb(inside, lambda: hasher.size, bounds.max_ratio, bounds.where)
    return Unpacked(limit(inside, bounds.max_bytes, bounds.where), wrapping, hasher)


def _from_tar(chunks: Iterator[bytes], hasher: Hasher, bounds: DownloadBounds) -> Unpacked:
    members = tar.members(ExactReader(chunks), bounds.where)
    first = next(members, None)
    if first is None:
        raise UnknownFormat("The tar archive is empty", bounds.where, "Give the URL of an image")
    if is_descriptor(first.name):
        return Unpacked(wrapping="tar", offered=hasher, members=_again(first, members))
    head, inside = peek(first.chunks)
    refuse_nested("tar", head, bounds.where)
    return Unpacked(_alone(inside, members, bounds.where), "tar", hasher)


def _again(first: TarMember, rest: Iterator[TarMember]) -> Iterator[TarMember]:
    yield first
    yield from rest


def _alone(inside: Iterator[bytes], rest: Iterator[TarMember], where: str) -> Iterator[bytes]:
    """The only member's bytes; UnknownFormat in place of the end if it was not the only one."""
    yield from inside
    if other := next(rest, None):
        raise UnknownFormat(
            f"The tar archive has several members ({other.name!a} is the second) and is no OVA",
            where,
            "Pack one image alone, or an OVA with its .ovf as the first member",
        )


def refuse_package(wanted: str, convert_to: str | None, where: str) -> None:
    """Raise UnknownFormat for an OVA that came where one image was asked for, or an image in another format."""
    if convert_to:
        raise UnknownFormat("The file is an OVA, which is not converted", where, "Ask without convert_to")
    if wanted not in ("auto", "ova"):
        raise UnknownFormat(f"The file is an OVA, but {wanted} was asked for", where, _AS_WHAT)


def first_bytes(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """What a format is guessed by, and all chunks again."""
    return peek(chunks, CHUNK)
