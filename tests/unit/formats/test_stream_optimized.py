"""A streamOptimized VMDK is read to its end marker, and a stream without it is an error."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssvm_worker.errors import CorruptImage
from ssvm_worker.formats import Inspection
from ssvm_worker.formats.extents import vmdk_extents
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.units import GiB, KiB, MiB
from tests.images import (
    GRAIN,
    SECTOR,
    overlay,
    padded,
    stream_optimized,
    stream_optimized_pieces,
    vmdk_grain,
    vmdk_header,
    vmdk_marker,
)

NOISE = random.Random(3).randbytes(GRAIN)
#: Grains 0, 1, 3 and a last one of 100 bytes.
DISK = NOISE + NOISE[::-1] + bytes(GRAIN) + NOISE + NOISE[:100]
PIECES = list(stream_optimized_pieces(DISK))
HEAD, GRAINS, TABLE, DIRECTORY, FOOTER, EOS = PIECES[0], PIECES[1:5], PIECES[5], PIECES[6], PIECES[7], PIECES[8]


def follow(stream: bytes, cuts: Iterable[int] = (), **options: int) -> StreamOptimized:
    """Read a stream, cut at these positions, to its end."""
    seen = StreamOptimized("disk-0", **options)
    for start, end in itertools.pairwise([0, *sorted(cuts), len(stream)]):
        seen(stream[start:end])
    seen.finish()
    return seen


def built(*pieces: bytes | list[bytes]) -> bytes:
    """Return the parts of a stream in another order."""
    return b"".join(piece if isinstance(piece, bytes) else b"".join(piece) for piece in pieces)


def test_whole() -> None:
    """A complete stream gives capacity, grains, their bytes, and no warning."""
    seen = follow(built(PIECES), capacity=4 * GRAIN + SECTOR)
    assert (seen.capacity, seen.lba_bytes, seen.grains) == (4 * GRAIN + SECTOR, 4 * GRAIN + SECTOR, 4)
    assert (seen.data_bytes, seen.size, seen.warnings) == (3 * GRAIN + SECTOR, len(built(PIECES)), [])


@pytest.mark.parametrize(
    "stream",
    [
        stream_optimized(b"", GiB),
        stream_optimized(NOISE, GiB),
        stream_optimized(bytes(33 * MiB) + b"x", 100 * MiB),
        stream_optimized(b"x", grain_size=128, version=1),
        built(HEAD, GRAINS[:2], vmdk_marker(1, 4), bytes(SECTOR), GRAINS[2:], TABLE, DIRECTORY, FOOTER, EOS),
    ],
    ids=["empty disk", "one grain", "grains in the second table", "version 1", "a progress marker"],
)
def test_taken(stream: bytes) -> None:
    """A disk with any fill is accepted, and so are markers without data."""
    assert follow(stream, inflate_every=1).capacity > 0


@given(st.lists(st.integers(0, len(built(PIECES))), max_size=30), st.integers(0, 3))
@settings(max_examples=60)
def test_cuts_mean_nothing(cuts: list[int], every: int) -> None:
    """The cuts between chunks do not matter."""
    seen, whole = follow(built(PIECES), cuts, inflate_every=every), follow(built(PIECES))
    assert (seen.grains, seen.data_bytes, seen.warnings) == (whole.grains, whole.data_bytes, [])


#: As VMware's own writer leaves it, which reuses one buffer for all markers: a sector in the padding, and more.
DIRTY = bytes(16) + b"\x80\x37" + bytes(6) + b"left over".ljust(488, b"\xff")


def dirty(stream_pieces: list[bytes]) -> bytes:
    """Return the stream with other bytes in the padding of every marker."""
    head, grains, tables, end = stream_pieces[0], stream_pieces[1:5], stream_pieces[5:-1], stream_pieces[-1]
    progress = vmdk_marker(0, 4)[:16] + DIRTY[16:]
    tables = [each[:16] + DIRTY[16:] + each[SECTOR:] for each in tables]
    return built(head, grains, progress, tables, end[:16], DIRTY[16:])


def test_padding_of_markers() -> None:
    """Only 16 bytes of a marker count for all readers, and nothing may follow the end marker."""
    stream = dirty(PIECES)
    assert follow(stream, inflate_every=1).grains == 4
    assert [each for _, each in vmdk_extents([stream], "disk", 4 * GRAIN + SECTOR)] == [
        each.ljust(GRAIN, b"\0") for each in (NOISE, NOISE[::-1], NOISE, NOISE[:100])
    ]
    for image in (stream, long_stream()):  # shorter and longer than the head that an inspection keeps
        inspection = Inspection("vmdk")
        inspection(image)
        assert inspection.finish().details["create_type"] == "streamOptimized"
        with pytest.raises(CorruptImage):
            follow(image + b"x")


def long_stream() -> bytes:
    """Return a stream of 2 MiB whose end marker has other bytes in its padding."""
    pieces = list(stream_optimized_pieces(random.Random(4).randbytes(2 * MiB)))
    return b"".join(pieces[:-1]) + DIRTY


def test_byte_by_byte() -> None:
    """Chunks of one byte give the same result."""
    stream = stream_optimized(b"x" * 1000)
    assert follow(stream, range(1, len(stream)), inflate_every=1).grains == 1


@given(st.integers(0, len(built(PIECES)) - 1))
@settings(max_examples=60)
def test_cut_short(length: int) -> None:
    """A stream that ends before its last byte is truncated or has no beginning."""
    with pytest.raises(CorruptImage, match="cut short"):
        follow(built(PIECES)[:length])


def test_progress() -> None:
    """The position in the disk grows with the grains, for any number of them."""
    seen = StreamOptimized()
    places = []
    for piece in PIECES:
        seen(piece)
        places.append(seen.lba_bytes // GRAIN)
    assert places == [0, 1, 2, 4, 4, 4, 4, 4, 4]


def bad_grain(lba: int, data: bytes, size: int | None = None) -> bytes:
    """Return a grain with any data."""
    return padded(struct.pack("<QI", lba, len(data) if size is None else size) + data, SECTOR)


BROKEN = {
    "nothing": (b"", "the stream is empty"),
    "an HTML page": (b"<html>".ljust(4096), "no VMDK header"),
    "a sparse VMDK without markers": (
        vmdk_header(capacity=8, flags=3) + bytes(1 << 17),
        "not streamOptimized: flags 0x3",
    ),
    "another compression": (vmdk_header(capacity=8, compression=2) + bytes(1 << 17), "compression 2"),
    "data inside the header": (vmdk_header(capacity=8, overhead=3) + bytes(1 << 17), "inside its header"),
    "another capacity": (stream_optimized(DISK, 9 * MiB), "has 262656 bytes, the stream says 9437184"),
    "a grain twice": (built(HEAD, GRAINS[0], GRAINS[0], EOS), "sector 0 is repeated"),
    "grains out of order": (built(HEAD, GRAINS[1], GRAINS[0], EOS), "sector 0 is repeated, or out of order"),
    "a grain off its boundary": (built(HEAD, vmdk_grain(5, NOISE), EOS), "claims sector 5 of a disk"),
    "a grain behind the disk": (built(HEAD, vmdk_grain(1 << 20, NOISE), EOS), "claims sector 1048576"),
    "a grain of a GiB": (built(HEAD, bad_grain(0, b"", 1 << 30), EOS), "1073741824 bytes of data"),
    "a grain that is no zlib": (built(HEAD, bad_grain(0, NOISE), EOS), "cannot be inflated"),
    "a grain that is too short": (built(HEAD, bad_grain(0, zlib.compress(b"x")), EOS), "inflates to 1 bytes"),
    "a grain that is a bomb": (built(HEAD, bad_grain(0, zlib.compress(bytes(MiB)))), "inflates to 65537 bytes"),
    "a grain cut in its data": (built(HEAD, bad_grain(0, zlib.compress(NOISE)[:-4]), EOS), "inflates to 65536 bytes"),
    "a flipped byte": (overlay(built(PIECES), {GRAIN + 1000: b"\x00\xff\x00"}), "cannot be inflated"),
    "an unknown marker": (built(HEAD, vmdk_marker(0, 9), EOS), "The bytes before offset 65552"),
    "a marker that jumps to nowhere": (built(HEAD, vmdk_marker(1 << 50, 4), EOS), "no end-of-stream marker"),
    "no end marker": (built(PIECES[:-1]), "no end-of-stream marker"),
    "zeros where grains should be": (
        built(HEAD, GRAINS[0], bytes(4096), GRAINS[1:], EOS),
        "Bytes follow the end-of-stream",
    ),
    "bytes behind the end": (built(PIECES, b"x" * 16), f"marker, from offset {len(built(PIECES))} on"),
    "one byte behind the end": (built(PIECES, b"x"), "Bytes follow the end-of-stream marker"),
    "a footer that is none": (built(PIECES[:-2], FOOTER[:SECTOR], bytes(SECTOR), EOS), "no VMDK header"),
}


@pytest.mark.parametrize(("stream", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(stream: bytes, why: str) -> None:
    """The error of a stream that violates the format has a position and a remedy."""
    for cuts in ((), range(1000, len(stream), 1000)):
        with pytest.raises(CorruptImage, match=why) as caught:
            follow(stream, cuts, capacity=4 * GRAIN + SECTOR, inflate_every=1)
        assert caught.value.where == "disk-0"
        assert caught.value.remedy


FOOTED = vmdk_header(capacity=999, gd_offset=7)
ODD = {
    "a footer that differs": (
        built(PIECES[:-2], FOOTER[:SECTOR], FOOTED, EOS),
        ["the footer contradicts the header: capacity", "there is no grain directory at sector 7"],
    ),
    "no footer": (built(PIECES[:-2], EOS), ["the header promises a footer, and there is none"]),
    "no tables": (built(HEAD, GRAINS, FOOTER, EOS), ["there is no grain directory at sector"]),
    "a table that lies": (
        overlay(built(PIECES), {len(built(HEAD, GRAINS)) + SECTOR: b"\x99"}),
        ["1 of 1 grain tables contradict the grains, first number 0"],
    ),
    "a grain that no table has": (
        overlay(built(PIECES), {len(built(HEAD, GRAINS)) + SECTOR: bytes(4)}),
        ["1 of 1 grain tables contradict the grains"],
    ),
    "a directory that lies": (
        overlay(built(PIECES), {len(built(HEAD, GRAINS, TABLE)) + SECTOR: bytes(4)}),
        ["1 of 1 grain tables contradict the grains"],
    ),
}


@pytest.mark.parametrize(("stream", "warnings"), ODD.values(), ids=ODD.keys())
def test_warned(stream: bytes, warnings: list[str]) -> None:
    """A contradiction in redundant data is only a warning."""
    seen = follow(stream)
    assert len(seen.warnings) == len(warnings)
    for said, expected in zip(seen.warnings, warnings, strict=True):
        assert said.startswith(expected)


def test_too_many_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables beyond the limit of the memory are not compared, which the warning says, and are no contradiction."""
    monkeypatch.setattr("ssvm_worker.formats.stream_optimized._MAX_TABLES", 0)
    assert [each.partition(", ")[0] for each in follow(built(PIECES)).warnings] == [
        "the grain tables were not compared with the grains"
    ]


def test_tables_in_the_head() -> None:
    """Tables in the head, where other writers than ESXi place them, are no contradiction."""
    head = overlay(HEAD, {0: vmdk_header(capacity=4 * GRAIN // SECTOR + 1, gd_offset=21)})
    assert follow(built(head, GRAINS, EOS)).warnings == []


def test_inflate_every_other() -> None:
    """Every Nth grain is inflated, and the others are skipped."""
    stream = built(HEAD, bad_grain(0, b"broken"), GRAINS[1:], PIECES[5:])
    assert follow(stream, inflate_every=2).grains == 4
    assert follow(stream).grains == 4
    with pytest.raises(CorruptImage, match="cannot be inflated"):
        follow(stream, inflate_every=1)


@given(st.dictionaries(st.integers(0, 700 * KiB), st.binary(min_size=1, max_size=8), max_size=3), st.data())
@settings(max_examples=100)
def test_mutants(patches: dict[int, bytes], data: st.DataObject) -> None:
    """A stream with any changed bytes gives a result or CorruptImage."""
    stream = built(PIECES)
    places = [0, 4, 8, 12, 20, 64, GRAIN, GRAIN + 8, len(stream) - 1024, len(stream) - 1536, len(stream) - 500]
    patches[data.draw(st.sampled_from(places))] = data.draw(st.binary(min_size=1, max_size=8))
    seen = StreamOptimized("disk-0", inflate_every=1)
    with contextlib.suppress(CorruptImage):
        seen(overlay(stream, patches)[: len(stream)])
        seen.finish()
        assert seen.lba_bytes == seen.capacity
    assert seen.grains <= len(GRAINS)
