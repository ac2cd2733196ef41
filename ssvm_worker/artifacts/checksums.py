"""Parse checksums, which users give, and compute digests.

A digest is written ``sha256:HEX`` everywhere. A ``Hasher`` is an observer for ``pipeline.store_stream``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ssvm_worker.errors import ChecksumMismatch, InvalidRequest

#: Algorithms of checksums, with the number of their hex digits. Vendors still publish MD5 and SHA-1.
HEX_LENGTHS = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}
_BY_LENGTH = {length: name for name, length in HEX_LENGTHS.items()}
#: Other names without their dashes. OpenSSL 3 writes SHA2-256. RFC 3230 and Java write SHA for SHA-1.
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
    """Return whether the checksum is the URL of a checksum file, not a digest."""
    return text.lower().startswith(("http://", "https://"))


def algorithm_of(name: str) -> str | None:
    """Return the algorithm of a name in any spelling (SHA-256, sha_256, SHA2-256), or None."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = _OTHER_NAMES.get(plain, plain)
    return plain if plain in HEX_LENGTHS else None


def hex_of(value: str, algorithm: str) -> str | None:
    """Return the lower-case hex of a digest in hex or base64. Return None if it does not fit the algorithm."""
    if _HEX.fullmatch(value):
        return value.lower() if len(value) == HEX_LENGTHS[algorithm] else None
    try:
        found = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return found.hex() if len(found) * 2 == HEX_LENGTHS[algorithm] else None


def parse_checksum(text: str) -> Digest:
    """Parse a checksum in any accepted form except a URL. Raise InvalidRequest if the form is wrong."""
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


def agreed(requested: Digest | None, offered: Sequence[Digest], location: str) -> Digest | None:
    """Return the checksum to verify: that of the request, else the first one that the source offers.

    Raises ChecksumMismatch if both have different values of the same algorithm.
    """
    for each in offered:
        if requested and each.algorithm == requested.algorithm and each != requested:
            what = f"The source announces {each}, but the request has {requested}"
            raise ChecksumMismatch(what, location, "Nothing was fetched. Compare both with the publisher's checksum")
    return requested or next(iter(offered), None)


class Hasher:
    """Observer that computes several digests of the bytes. It always computes SHA-256.

    hashlib releases the GIL for chunks of more than 2 KiB. So a Hasher in a separate thread uses a second core.
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
        """Return the digest of the bytes so far."""
        return Digest(algorithm, self._hashes[algorithm].hexdigest())

    def digests(self) -> list[Digest]:
        """Return the digests of the bytes so far, one for each algorithm."""
        return [self.digest(name) for name in self._hashes]

    def verify(self, expected: Digest | None, location: str) -> None:
        """Raise ChecksumMismatch if the digest of the bytes so far is not *expected*. None accepts any digest."""
        if expected is None:
            return
        actual = self.digest(expected.algorithm)
        if actual != expected:
            raise ChecksumMismatch(
                f"The checksum is wrong: expected {expected}, got {actual} over {self.size} bytes",
                location,
                "Nothing was stored. Compare the checksum with the publisher's, then submit the job again",
            )


def digest_of(data: bytes) -> Digest:
    """Return the SHA-256 of bytes in memory."""
    return Digest("sha256", hashlib.sha256(data).hexdigest())
