"""Users' checksums are read in every form that publishers use, or refused with a reason."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.artifacts.checksums import HEX_LENGTHS, Digest, Hasher, digest_of, is_checksum_url, parse_checksum
from ssvm_worker.errors import ChecksumMismatch, InvalidRequest

ABC = hashlib.sha256(b"abc").hexdigest()
ABC_MD5 = hashlib.md5(b"abc").hexdigest()

FORMS = [
    pytest.param(f"sha256:{ABC}", id="sha256:HEX"),
    pytest.param(f"SHA-256:{ABC.upper()}", id="upper case"),
    pytest.param(f"{{SHA-256}}{ABC}", id="CloudStack's braces"),
    pytest.param(f"{{sha256}} {ABC}", id="braces and a blank"),
    pytest.param(ABC, id="bare"),
    pytest.param(f"  {ABC}\n", id="with blanks around"),
    pytest.param(f"sha256: {ABC}", id="blank behind the colon"),
    pytest.param(f"SHA2-256:{ABC}", id="as OpenSSL 3 names it"),
    pytest.param(f"{{SHA2-256}}{ABC}", id="as OpenSSL 3 names it, in braces"),
    pytest.param(f"sha_256={ABC}", id="an equals sign"),
    pytest.param(f"sha256-{base64.b64encode(hashlib.sha256(b'abc').digest()).decode()}", id="subresource integrity"),
]


@pytest.mark.parametrize("text", FORMS)
def test_forms(text: str) -> None:
    """All forms of one checksum are the same digest."""
    assert parse_checksum(text) == Digest("sha256", ABC) == digest_of(b"abc")


@pytest.mark.parametrize("algorithm", HEX_LENGTHS)
def test_algorithms(algorithm: str) -> None:
    """Each algorithm is recognised by its name, or by the length of a bare digest."""
    value = hashlib.new(algorithm, b"abc").hexdigest()
    assert parse_checksum(f"{algorithm}:{value}") == parse_checksum(value) == Digest(algorithm, value)


REFUSED = [
    pytest.param("", "unknown", id="empty"),
    pytest.param("abc", "unknown", id="too short to guess"),
    pytest.param(f"crc32:{ABC[:8]}", "unknown", id="unknown algorithm"),
    pytest.param(f"{{SHA-3}}{ABC}", "unknown", id="unknown algorithm in braces"),
    pytest.param(f"SHA3-256:{ABC}", "unknown", id="SHA-3 is another algorithm"),
    pytest.param(f"SHA512/256:{ABC}", "unknown", id="SHA-512/256 is another algorithm"),
    pytest.param(f"sha512-256:{ABC}", "unknown", id="SHA-512/256 with a dash"),
    pytest.param("sha256-YWJj", "unknown", id="too little base64"),
    pytest.param(f"md5:{ABC}", "32 hex digits, not 64", id="another algorithm's length"),
    pytest.param(f"sha256:{ABC}0", "64 hex digits, not 65", id="a digit too many"),
    pytest.param("sha256:", "64 hex digits, not 0", id="no digits"),
    pytest.param("sha256:" + "g" * 64, "hex digits", id="no hex"),
    pytest.param("sha256:" + "٣" * 64, "hex digits", id="digits of another script"),
    pytest.param(f"sha256:sha256:{ABC}", "hex digits", id="named twice"),
]


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_refused(text: str, why: str) -> None:
    """An invalid checksum is refused, and the error names the accepted forms."""
    with pytest.raises(InvalidRequest, match=why) as caught:
        parse_checksum(text)
    assert "sha256:HEX" in caught.value.remedy


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    """Any text gives a digest or an error of the request, never a crash."""
    with contextlib.suppress(InvalidRequest):
        assert len(parse_checksum(text).hex) in HEX_LENGTHS.values()


def test_url() -> None:
    """A checksum may be the URL of a checksum file."""
    assert is_checksum_url("https://example.org/SHA256SUMS")
    assert is_checksum_url("HTTPS://example.org/SHA256SUMS")
    assert not is_checksum_url(f"sha256:{ABC}")


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=5))
def test_chunking_means_nothing(data: bytes, cuts: list[int]) -> None:
    """The size of the chunks changes neither the digests nor the byte count."""
    hasher = Hasher("md5", "sha256")
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        hasher(data[start:end])
    assert (hasher.digest(), hasher.size) == (digest_of(data), len(data))
    assert hasher.digest("md5").hex == hashlib.md5(data).hexdigest()


def test_verify() -> None:
    """The right checksum passes, and an absent checksum always passes."""
    hasher = Hasher("md5")
    hasher(b"abc")
    hasher.verify(None, "image")
    hasher.verify(Digest("sha256", ABC), "image")
    hasher.verify(Digest("md5", ABC_MD5), "image")


def test_mismatch() -> None:
    """The error of a mismatch names both digests, the byte count and the location."""
    hasher = Hasher()
    hasher(b"abd")
    with pytest.raises(ChecksumMismatch) as caught:
        hasher.verify(Digest("sha256", ABC), "image")
    assert all(part in str(caught.value) for part in (ABC, str(digest_of(b"abd")), "3 bytes", "image"))
