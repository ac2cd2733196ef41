"""Checksums that users give, digests that we compute.

A digest is written ``sha256:HEX`` everywhere. ``Hasher`` is an observer for ``stream.store_stream``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ChecksumMismatch, InvalidRequest

#: Algorithms that a user may ask for, with the length of their hex form. MD5 and SHA-1 are still published by vendors.
HEX_LENGTHS = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}
_BY_LENGTH = {length: name for name, length in HEX_LENGTHS.items()}
_HEX = re.compile(r"[0-9a-fA-F]+")
_FORMS = "sha256:HEX, {SHA-256}HEX, a bare digest, or the http(s) URL of a SHA256SUMS-style file"


@dataclass(frozen=True)
class Digest:
    """An algorithm and the lower-case hex of its value."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def is_checksum_url(text: str) -> bool:
    """Whether the checksum is the address of a sums file rather than a digest."""
    return text.startswith(("http://", "https://"))


def parse_checksum(text: str) -> Digest:
    """Read a checksum in any of the accepted forms but the URL; InvalidRequest names what is wrong."""
    text = text.strip()
    if match := re.fullmatch(r"\{([^}]*)\}(.*)", text):
        name, value = match.groups()
    elif ":" in text:
        name, _, value = text.partition(":")
    else:
        name, value = _BY_LENGTH.get(len(text), ""), text
    algorithm = name.lower().replace("-", "").replace("_", "")
    value = value.strip()
    if algorithm not in HEX_LENGTHS:
        raise InvalidRequest("Checksum of an unknown form or algorithm", text[:140], f"Give {_FORMS}")
    if len(value) != HEX_LENGTHS[algorithm] or not _HEX.fullmatch(value):
        raise InvalidRequest(
            f"A {algorithm} checksum has {HEX_LENGTHS[algorithm]} hex digits, not {len(value)}",
            text[:140],
            f"Give {_FORMS}",
        )
    return Digest(algorithm, value.lower())


#: ``HEX  name`` and ``HEX *name`` (GNU coreutils), ``ALG (name) = HEX`` (BSD, Fedora's CHECKSUM files).
_GNU = re.compile(r"^\\?([0-9a-fA-F]{32,128})\s+[ *]?(.+?)\s*$")
_BSD = re.compile(r"^([A-Za-z0-9-]+)\s*\((.+)\)\s*=\s*([0-9a-fA-F]{32,128})\s*$")


def find_in_sums(sums: str, file_name: str, where: str) -> Digest:
    """The digest that a SHA256SUMS-style file gives for *file_name*.

    Lines are matched by the last part of their path; a file holding one bare digest is taken as it is.
    Raises InvalidRequest when the file names no such file.
    """
    bare = sums.split()
    if len(bare) == 1 and _HEX.fullmatch(bare[0]):
        return parse_checksum(bare[0])
    for line in sums.splitlines():
        if match := _BSD.match(line):
            algorithm, name, value = match.groups()
        elif match := _GNU.match(line):
            (value, name), algorithm = match.groups(), ""
        else:
            continue
        if name.rsplit("/", 1)[-1] == file_name:
            return parse_checksum(f"{algorithm}:{value}" if algorithm else value)
    raise InvalidRequest(
        f"The checksum file names no {file_name!r}", where, "Give the digest itself, or the sums file of this image"
    )


def agreed(asked: Digest | None, offered: Sequence[Digest], where: str) -> Digest | None:
    """The checksum to compare with: the one that was asked for, else the first that the source itself came with.

    Raises ChecksumMismatch when the two name different values of one algorithm.
    """
    for each in offered:
        if asked and each.algorithm == asked.algorithm and each != asked:
            what = f"The source announces {each}, the request asks for {asked}"
            raise ChecksumMismatch(what, where, "Nothing was fetched. Compare both with the publisher's")
    return asked or next(iter(offered), None)


class Hasher:
    """Computes several digests of the passing bytes at once; call it with each chunk.

    hashlib releases the GIL for chunks above 2 KiB, so a Hasher in its own thread uses a second core.
    """

    def __init__(self, *algorithms: str) -> None:
        self._hashes = {
            name: hashlib.new(name, usedforsecurity=False) for name in {"sha256": 0, **dict.fromkeys(algorithms)}
        }
        self.size = 0

    def __call__(self, chunk: bytes) -> None:
        self.size += len(chunk)
        for each in self._hashes.values():
            each.update(chunk)

    def digest(self, algorithm: str = "sha256") -> Digest:
        """The digest so far."""
        return Digest(algorithm, self._hashes[algorithm].hexdigest())

    def digests(self) -> list[Digest]:
        """The digests so far in all the algorithms."""
        return [self.digest(name) for name in self._hashes]

    def verify(self, expected: Digest | None, where: str) -> None:
        """Raise ChecksumMismatch unless the bytes so far have the expected digest; None expects nothing."""
        if expected is None:
            return
        actual = self.digest(expected.algorithm)
        if actual != expected:
            raise ChecksumMismatch(
                f"The checksum is wrong: expected {expected}, got {actual} over {self.size} bytes",
                where,
                "Nothing was stored. Compare the checksum with the publisher's, then ask again",
            )


def digest_of(data: bytes) -> Digest:
    """The SHA-256 of bytes in memory."""
    return Digest("sha256", hashlib.sha256(data).hexdigest())
