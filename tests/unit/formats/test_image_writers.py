"""Disks become images in one forward pass, and qemu-img finds the disk's content in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import CorruptImage
from ssvm_worker.formats.extents import Extent, vmdk_extents
from ssvm_worker.formats.stream_optimized import StreamOptimized
from ssvm_worker.formats.writers.qcow2 import most_clusters, qcow2
from ssvm_worker.formats.writers.raw import raw
from ssvm_worker.formats.writers.vmdk import stream_optimized
from ssvm_worker.units import KiB, MiB
from tests import images
from tests.qemu import assert_same_disk

GRAIN = 64 * KiB


def disk(size: int, seed: int = 1) -> bytes:
    """Return a disk with scattered data."""
    chance, content = random.Random(seed), bytearray(size)
    for _ in range(12):
        at = chance.randrange(size)
        piece = chance.randbytes(min(chance.choice((1, 100, GRAIN, 5 * GRAIN)), size - at))
        content[at : at + len(piece)] = piece
    return bytes(content)


def grains(content: bytes, size: int = GRAIN) -> list[Extent]:
    """Return the disk as extents of that many bytes, without zero extents, the last one in full length."""
    pieces = ((at, content[at : at + size].ljust(size, b"\0")) for at in range(0, len(content), size))
    return [piece for piece in pieces if any(piece[1])]


def as_raw(extents: Iterator[Extent], capacity: int) -> Iterator[bytes]:
    return raw(extents, capacity, "disk")


def as_qcow2(extents: Iterator[Extent], capacity: int) -> Iterator[bytes]:
    return qcow2(extents, capacity, most_clusters(capacity, capacity // 2, GRAIN), "disk")


def as_vmdk(extents: Iterator[Extent], capacity: int) -> Iterator[bytes]:
    return stream_optimized(extents, capacity, "disk.vmdk")


WRITERS: dict[str, Callable[[Iterator[Extent], int], Iterator[bytes]]] = {
    "raw": as_raw,
    "qcow2": as_qcow2,
    "vmdk": as_vmdk,
}


@pytest.mark.parametrize("size", [512, GRAIN, 3 * GRAIN + 512, 33 * MiB + 1024], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_images_hold_the_disk(tmp_path: Path, format_: str, size: int) -> None:
    """An image of a disk of any size is intact and identical with it."""
    content = disk(size)
    writer = WRITERS[format_] if format_ != "qcow2" else lambda each, size: qcow2(each, size, -(-size // GRAIN), "x")

    (tmp_path / "image").write_bytes(b"".join(writer(iter(grains(content)), size)))

    (tmp_path / "disk").write_bytes(content)
    assert_same_disk(tmp_path / "image", format_, tmp_path / "disk")


@pytest.mark.parametrize("grain", [4 * KiB, 64 * KiB, 1 * MiB], ids=lambda size: f"grains of {size} bytes")
def test_qcow2_of_other_grains(tmp_path: Path, grain: int) -> None:
    """Data in grains of another size than a cluster fits into the declared size, over several L2 tables too."""
    size = 1100 * MiB + 512
    content = {at: bytes([at % 251 + 1]) * grain for at in (0, 3 * grain, 600 * MiB, 600 * MiB + grain, 1099 * MiB)}
    clusters = most_clusters(size, len(content) * grain, grain)

    (tmp_path / "image").write_bytes(b"".join(qcow2(iter(content.items()), size, clusters, "disk")))

    with (tmp_path / "disk").open("wb") as made:
        for at, data in content.items():
            made.seek(at)
            made.write(data)
        made.truncate(size)
    assert_same_disk(tmp_path / "image", "qcow2", tmp_path / "disk")
    assert (tmp_path / "image").stat().st_size < len(content) * max(grain, GRAIN) + 12 * GRAIN


def test_stream_of_our_own_has_no_contradiction() -> None:
    """Tables, directory and footer of a written stream agree with its grains, which can all be inflated."""
    content = disk(70 * MiB)
    verifier = StreamOptimized("disk", len(content), inflate_every=1)

    for chunk in as_vmdk(iter(grains(content)), len(content)):
        verifier(chunk)

    verifier.finish()
    assert verifier.warnings == []
    assert verifier.grains == len(grains(content))


@pytest.mark.parametrize("cut", [1, 511, 70_000, 1 << 20], ids=lambda cut: f"chunks of {cut}")
def test_extents_of_a_stream(cut: int) -> None:
    """The grains of a stream are returned in order and completely, for any size of chunks."""
    content = disk(5 * GRAIN + 1024)
    stream = images.stream_optimized(content)
    chunks = (stream[at : at + cut] for at in range(0, len(stream), cut))

    assert list(vmdk_extents(chunks, "disk", len(content))) == grains(content)


STREAM = images.stream_optimized(disk(5 * GRAIN))


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(STREAM[:-512], id="no end marker"),
        pytest.param(STREAM[: GRAIN + 700], id="cut inside a grain"),
        pytest.param(STREAM[:300], id="cut inside the header"),
        pytest.param(STREAM + bytes(512), id="more behind the end"),
        pytest.param(images.overlay(STREAM, {GRAIN + 40: b"damage"}), id="a grain that cannot be inflated"),
    ],
)
def test_damaged_streams_have_no_extents(stream: bytes) -> None:
    """A damaged stream is an error, at the latest at its end."""
    with pytest.raises(CorruptImage):
        list(vmdk_extents(iter([stream] if stream else []), "disk", 5 * GRAIN))


@pytest.mark.parametrize(
    "extents",
    [
        pytest.param([(GRAIN, bytes(GRAIN)), (0, bytes(GRAIN))], id="out of order"),
        pytest.param([(0, bytes(GRAIN)), (512, bytes(512))], id="overlapping"),
        pytest.param([(8 * GRAIN, bytes(GRAIN))], id="beyond the end"),
    ],
)
@pytest.mark.parametrize("format_", list(WRITERS))
def test_impossible_extents(format_: str, extents: list[Extent]) -> None:
    """Every writer refuses extents that cannot be a disk."""
    with pytest.raises(CorruptImage):
        list(WRITERS[format_](iter(extents), 8 * GRAIN))


def test_more_data_than_promised() -> None:
    """More data than a qcow2's header declared is refused."""
    with pytest.raises(CorruptImage, match="2 clusters"):
        list(qcow2(iter(grains(b"x" * 3 * GRAIN)), 3 * GRAIN, 2, "disk"))
