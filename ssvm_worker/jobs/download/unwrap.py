"""Remove what is around a downloaded image: a compression or a tar archive. Return the members of an OVA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.errors import UnknownFormat
from ssvm_worker.formats.ova import is_descriptor
from ssvm_worker.streaming.pipeline import limit, tap
from ssvm_worker.unpacking import peek, recognise, refuse_bomb, refuse_nested, tar, unwrap
from ssvm_worker.unpacking.exact_reader import ExactReader
from ssvm_worker.unpacking.tar import TarMember


@dataclass(frozen=True)
class DownloadBounds:
    """The limits for the unpacked bytes of a download."""

    max_bytes: int
    max_ratio: int
    #: The name of the file in errors.
    location: str


@dataclass(frozen=True)
class Unpacked:
    """The image, or the members of an OVA."""

    #: The chunks of the image. Empty for an OVA.
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    #: What was around the image: gzip, bzip2, xz, zstandard, zip or tar; "" for nothing.
    wrapping: str = ""
    #: The hasher of the file as the server offers it. None: that file is the image.
    offered: Hasher | None = None
    #: The members of an OVA, the descriptor first. Read each member before the next.
    members: Iterator[TarMember] | None = None


def unpack(chunks: Iterator[bytes], hasher: Hasher, bounds: DownloadBounds) -> Unpacked:
    """Detect by the first bytes what is around the image, and remove it.

    *hasher* hashes the file as the server offers it. It is not used if there is nothing around the image.
    """
    head, chunks = peek(chunks)
    wrapping = recognise(head)
    if not wrapping:
        return Unpacked(chunks)
    chunks = tap(chunks, hasher)
    if wrapping != "tar":
        _, inside = unwrap(chunks, bounds.location)
        inside = refuse_bomb(inside, lambda: hasher.size, bounds.max_ratio, bounds.location)
        return Unpacked(limit(inside, bounds.max_bytes, bounds.location), wrapping, hasher)
    members = tar.members(ExactReader(chunks), bounds.location)
    first = next(members, None)
    if first is None:
        raise UnknownFormat("The tar archive is empty", bounds.location, "Give the URL of an image")
    if is_descriptor(first.name):
        return Unpacked(wrapping="tar", offered=hasher, members=chain([first], members))
    head, inside = peek(first.chunks)
    refuse_nested("tar", head, bounds.location)
    return Unpacked(_only_member(inside, members, bounds.location), "tar", hasher)


def _only_member(inside: Iterator[bytes], rest: Iterator[TarMember], location: str) -> Iterator[bytes]:
    """Yield the chunks of the first member. At the end raise UnknownFormat if the archive has another member."""
    yield from inside
    if other := next(rest, None):
        raise UnknownFormat(
            f"The tar archive has several members ({other.name!a} is the second) and is not an OVA",
            location,
            "Pack one image alone, or an OVA with its .ovf as the first member",
        )
