"""Checksums that users give, digests that we compute.

A digest is written ``sha256:HEX`` everywhere. ``Hasher`` is an observer for ``stream.store_stream``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssvm_worker.errors import ChecksumMismatch, InvalidRequest

#: Algorithms that a user may ask for, with the length of their hex form. MD5 and SHA-1 are still published by vendors.
HEX_LENGTHS = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}
_BY_LENGTH = {length: name for name, length in HEX_LENGTHS.items()}
#: Other names, without dashes: OpenSSL 3 writes SHA2-256; RFC 3230 and Java write SHA.
_OTHER_NAMES = {"sha": "sha1", **{f"sha2{name[3:]}": name for name in HEX_LENGTHS if len(name) == 6}}
_HEX = re.compile(r"[0-9a-fA-F]+")
#: ``{SHA-256}HEX``, ``sha256-BASE64`` (Subresource Integrity), ``sha256:HEX`` and ``sha256=HEX``.
_NAMED = (
    re.compile(r"\{([^}]*)\}(.*)"),
    re.compile(r"(sha\d{3})-([\w+/]{38,88}={0,2})"),
    re.compile(r"([^:=]*)[:=](.*)"),
)
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


def algorithm_of(name: str) -> str | None:
    """Return the algorithm that a name means, in any spelling: SHA-256, sha_256, SHA2-256; None for any other."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = _OTHER_NAMES.get(plain, plain)
    return plain if plain in HEX_LENGTHS else None


def hex_of(value: str, algorithm: str) -> str | None:
    """Return the lower-case hex of a digest in hex or base64; None for what is no digest of that algorithm."""
    if _HEX.fullmatch(value):
        return value.lower() if len(value) == HEX_LENGTHS[algorithm] else None
    try:
        found = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return found.hex() if len(found) * 2 == HEX_LENGTHS[algorithm] else None


def parse_checksum(text: str) -> Digest:
    """Read a checksum in any of the accepted forms but the URL; InvalidRequest names what is wrong."""
    text = text.strip()
    match = next(filter(None, (form.fullmatch(text) for form in _NAMED)), None)
    name, value = match.groups() if match else (_BY_LENGTH.get(len(text), ""), text)
    algorithm = algorithm_of(name)
    value = value.strip()
    if algorithm is None:
        raise InvalidRequest("Checksum of an unknown form or algorithm", text[:140], f"Give {_FORMS}")
    digits = hex_of(value, algorithm)
    if digits is None:
        what = f"A {algorithm} checksum has {HEX_LENGTHS[algorithm]} hex digits, not {len(value)}"
        raise InvalidRequest(what, text[:140], f"Give {_FORMS}")
    return Digest(algorithm, digits)


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
