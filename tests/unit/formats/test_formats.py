"""The recognition of image formats, with the same result for any size of chunks."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssvm_worker.errors import AmbiguousFormat, CorruptImage, ImageError, InvalidRequest, TooLarge, UnknownFormat
from ssvm_worker.formats import ImageInfo, Inspection, guess_format
from ssvm_worker.units import GiB, MiB
from tests.images import (
    gpt,
    iso,
    mbr,
    overlay,
    qcow2,
    qcow2_backed_by,
    stream_optimized,
    vhd_dynamic,
    vhd_fixed,
    vhdx,
    vmdk_descriptor,
)
from tests.neighbours import missing

NOISE = random.Random(1).randbytes(2 * MiB)
#: A UDF anchor that names block 257, which describes a partition of 42 blocks from block 258.
UDF = overlay(
    iso(300),
    {
        32768: b"\0BEA01\x01",
        256 * 2048: struct.pack("<H10xI4I", 2, 256, 2048, 257, 0, 0),
        257 * 2048: struct.pack("<H186xII", 5, 258, 42),
    },
)


def inspect(image: bytes, expected: str = "auto", chunk: int = MiB, limit: int = 64 * GiB) -> ImageInfo:
    """Return the inspection of bytes that arrive in chunks of one size."""
    inspection = Inspection(expected, limit, "disk.img")
    for at in range(0, len(image), chunk):
        inspection(image[at : at + chunk])
    return inspection.finish()


def verdict(image: bytes, cuts: Iterable[int] = (), expected: str = "auto") -> str:
    """Return the inspection as a short text: format and size, or the error's class and text."""
    inspection = Inspection(expected, 64 * GiB, "disk.img")
    places = [0, *sorted(cuts), len(image)]
    try:
        for start, end in itertools.pairwise(places):
            if start < end:
                inspection(image[start:end])
        info = inspection.finish()
    except ImageError as error:
        return f"{type(error).__name__}: {error}"
    return f"{info.format} {info.virtual_size} {info.details}"


GOOD = {
    "a qcow2": (qcow2(), "qcow2", 1 << 20),
    "a qcow2 of version 2": (qcow2(version=2), "qcow2", 1 << 20),
    "a qcow2 with an L2 table": (qcow2(l1_entry=4 * 4096), "qcow2", 1 << 20),
    "a qcow2 left dirty by lazy refcounts": (qcow2(incompatible=1), "qcow2", 1 << 20),
    "a qcow2 with zstd compression": (qcow2(incompatible=8, compression=1), "qcow2", 1 << 20),
    "a streamOptimized VMDK": (stream_optimized(NOISE), "vmdk", 2 * MiB),
    "an empty streamOptimized VMDK": (stream_optimized(b"", GiB), "vmdk", GiB),
    "a dynamic VHD": (vhd_dynamic(), "vhd", 4 << 20),
    "a fixed VHD of a partitioned disk": (vhd_fixed(mbr()), "vhd", 1 << 20),
    "a fixed VHD longer than the head": (vhd_fixed(NOISE), "vhd", 2 * MiB),
    "a VHDX": (vhdx(), "vhdx", 4 << 20),
    "an ISO": (iso(), "iso", 40960),
    "an isohybrid ISO": (iso(system_area=mbr(32 << 10)), "iso", 40960),
    "a UDF image without ISO 9660": (UDF, "iso", 300 * 2048),
    "a raw disk with an MBR": (mbr(), "raw", 1 << 20),
    "a raw disk with a GPT": (gpt(), "raw", 1 << 20),
    "a raw disk with a GPT of 4 KiB sectors": (gpt(sector=4096), "raw", 1 << 20),
    "a raw disk without partitions": (NOISE, "raw", 2 * MiB),
    "a raw disk of zeros": (bytes(1 << 20), "raw", 1 << 20),
    "a raw disk of one sector": (b"\xeb" * 512, "raw", 512),
    "a raw disk that begins with letters": (b"a" * 4096 + bytes(4096), "raw", 8192),
}
good = pytest.mark.parametrize(("image", "name", "size"), GOOD.values(), ids=GOOD.keys())


@good
def test_recognised(image: bytes, name: str, size: int) -> None:
    """The format, the virtual and the physical size are derived from the bytes alone."""
    info = inspect(image)
    assert (info.format, info.virtual_size, info.physical_size) == (name, size, len(image))


@good
def test_declared(image: bytes, name: str, size: int) -> None:
    """A request for the right format, in either spelling, changes nothing."""
    assert inspect(image, name) == inspect(image, name.upper()) == inspect(image)


@good
def test_wrongly_declared(image: bytes, name: str, size: int) -> None:
    """The error of a wrong format names both, and a fixed VHD is a raw disk until its end."""
    seen = "vhd|raw" if name == "vhd" else name
    for other in {"qcow2", "vmdk", "vhd", "vhdx", "iso", "raw"} - {name}:
        with pytest.raises(UnknownFormat, match=f"The image is ({seen}), but {other} was asked for"):
            inspect(image, other)


@good
@given(data=st.data())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_mean_nothing(data: st.DataObject, image: bytes, name: str, size: int) -> None:
    """The result does not depend on the cuts of the stream."""
    cuts = data.draw(st.lists(st.integers(1, len(image)), max_size=12))
    assert verdict(image, cuts) == verdict(image)


@pytest.mark.parametrize(
    ("image", "table"),
    [(mbr(), "mbr"), (gpt(), "gpt"), (gpt(sector=4096), "gpt"), (NOISE, "none"), (mbr(kind=0), "none")],
    ids=["an MBR", "a GPT", "a GPT of 4 KiB sectors", "no table", "a boot sector without partitions"],
)
def test_partition_table(image: bytes, table: str) -> None:
    """The facts of a raw disk have its partition table."""
    assert inspect(image, "raw").details["partition_table"] == table


CUT = {
    "a qcow2 without its L1 table": (qcow2()[: 3 * 4096], "L1 table|L1|offset 12288"),
    "a qcow2 whose L2 table is missing": (qcow2(l1_entry=64 * 4096), "its table at offset 262144 has 4096 bytes"),
    "a qcow2 of its first sector": (qcow2()[:512], "its L1 table ends at offset 12296"),
    "a qcow2 cut in its header": (qcow2()[:80], "header of version 3"),
    "a streamOptimized VMDK without its end marker": (
        stream_optimized(NOISE)[:-512],
        "no footer and end-of-stream",
    ),
    "a streamOptimized VMDK cut by half": (stream_optimized(NOISE)[: MiB + 77], "no footer and end-of-stream"),
    "a VMDK of its header alone": (stream_optimized(NOISE)[:512], "bytes at offset 512"),
    "a dynamic VHD without its footer": (vhd_dynamic()[:-512], "cut short"),
    "a dynamic VHD whose block is missing": (vhd_dynamic(block=9000), "block table"),
    "a fixed VHD that lost sectors": (vhd_fixed(NOISE, size=3 * MiB), "its VHD footer says 3146240 bytes"),
    "a VHDX of its first MiB": (vhdx()[:MiB], "names 65536 bytes"),
    "a VHDX whose block table is missing": (vhdx(bat_at=8 << 20), "its block table ends at 9437184"),
    "an ISO shorter than its volume": (iso(says=21), "its volume has 43008 bytes"),
    "an ISO cut in its descriptor": (iso()[:33000], "volume descriptor"),
    "a GPT disk without its end": (gpt(2 * MiB)[:MiB], "its GPT describes a disk of 2097152 bytes"),
}


@pytest.mark.parametrize(("image", "why"), CUT.values(), ids=CUT.keys())
def test_cut_short(image: bytes, why: str) -> None:
    """An image that is shorter than its header says is corrupt, and the error has the position."""
    with pytest.raises(CorruptImage, match=why):
        inspect(image)


@pytest.mark.parametrize(
    "image",
    [stream_optimized(b"", 65 * GiB), vhd_dynamic(65 * GiB), vhdx(65 * GiB), qcow2(size=1 << 20)],
    ids=["vmdk", "vhd", "vhdx", "qcow2"],
)
def test_too_large(image: bytes) -> None:
    """A virtual size above the limit is refused before the whole image has passed."""
    inspection = Inspection("auto", min(64 * GiB, (1 << 20) - 1) if image.startswith(b"QFI") else 64 * GiB)
    with pytest.raises(TooLarge, match="are allowed"):
        inspection(image + bytes(4 * MiB))


def test_too_large_raw() -> None:
    """A raw disk above the limit is refused at once, without the footer of a fixed VHD."""
    with pytest.raises(TooLarge):
        inspect(NOISE, limit=2 * MiB - 512)
    assert inspect(vhd_fixed(NOISE), limit=2 * MiB).virtual_size == 2 * MiB


@pytest.mark.parametrize(
    "image",
    [
        iso(system_area=qcow2()),
        overlay(qcow2(), {510: b"\x55\xaa", 446: mbr()[446:462]}),
        iso(system_area=vmdk_descriptor(8)),
        overlay(iso(40), {0: b"vhdxfile"}),
        vhd_fixed(iso()),
        vhd_fixed(qcow2()),
    ],
    ids=["qcow2 and ISO", "qcow2 and MBR", "VMDK and ISO", "VHDX and ISO", "ISO and VHD", "qcow2 and VHD"],
)
def test_two_at_once(image: bytes) -> None:
    """A file of two formats is refused for either requested format."""
    for expected in ("auto", "iso", "qcow2", "raw", "vhd"):
        with pytest.raises((AmbiguousFormat, UnknownFormat), match=r" at once|was asked for"):
            inspect(image, expected)
    with pytest.raises(AmbiguousFormat):
        inspect(image)


@pytest.mark.parametrize("head", [NOISE, qcow2(size=GiB, l1_size=512), vhdx()], ids=["raw", "qcow2", "vhdx"])
def test_memory(head: bytes) -> None:
    """An inspection uses a few MiB for an image of any size."""
    inspection, chunk = Inspection(), bytes(MiB)
    tracemalloc.start()
    try:
        inspection(head)
        for _ in range(64):
            inspection(chunk)
        assert tracemalloc.get_traced_memory()[1] < 7 * MiB
    finally:
        tracemalloc.stop()


def test_unknown_name() -> None:
    """An unsupported format is refused before the first byte."""
    with pytest.raises(InvalidRequest, match="auto, qcow2, vmdk, vhd, vhdx, iso, raw"):
        Inspection("qcow3")


def test_guess() -> None:
    """The file's name is guessed from its first bytes, without an inspection."""
    heads = [qcow2_backed_by("/etc/passwd"), stream_optimized(b""), vhd_dynamic(), vhdx()[:100], iso(), b"?"]
    assert [guess_format(head) for head in heads] == ["qcow2", "vmdk", "vhd", "vhdx", "iso", "raw"]


MADE = {
    "qcow2": ("qcow2", "qcow2"),
    "qcow2 of version 2": ("qcow2 -o compat=0.10", "qcow2"),
    "compressed qcow2": ("qcow2 -c", "qcow2"),
    "qcow2 with zstd": ("qcow2 -c -o compression_type=zstd", "qcow2"),
    "qcow2 with small clusters": ("qcow2 -o cluster_size=512", "qcow2"),
    "qcow2 with large clusters": ("qcow2 -o cluster_size=2M,lazy_refcounts=on", "qcow2"),
    "preallocated qcow2": ("qcow2 -o preallocation=metadata", "qcow2"),
    "monolithicSparse VMDK": ("vmdk", "vmdk"),
    "streamOptimized VMDK": ("vmdk -o subformat=streamOptimized", "vmdk"),
    "dynamic VHD": ("vpc", "vhd"),
    "dynamic VHD of the exact size": ("vpc -o force_size=on", "vhd"),
    "fixed VHD": ("vpc -o subformat=fixed", "vhd"),
    "dynamic VHDX": ("vhdx", "vhdx"),
    "fixed VHDX": ("vhdx -o subformat=fixed", "vhdx"),
    "raw": ("raw", "raw"),
}


def qemu_img(command: str, folder: Path) -> bytes:
    """Run qemu-img in a folder, and return its standard output."""
    if not shutil.which("qemu-img"):
        missing("qemu-img", "install qemu-utils")
    return subprocess.run(["qemu-img", *command.split()], cwd=folder, check=True, capture_output=True).stdout


@pytest.mark.parametrize(("options", "name"), MADE.values(), ids=MADE.keys())
def test_made_by_qemu(options: str, name: str, tmp_path: Path) -> None:
    """qemu-img's images are accepted with the virtual size that qemu-img reports."""
    (tmp_path / "in").write_bytes(NOISE[:MiB] + bytes(3 * MiB) + NOISE[: MiB + 512])
    qemu_img(f"convert -f raw -O {options} in out", tmp_path)
    told = json.loads(qemu_img(f"info --output=json -f {options.split()[0]} out", tmp_path))
    info = inspect((tmp_path / "out").read_bytes(), chunk=65536)
    assert (info.format, info.virtual_size) == (name, told["virtual-size"])


@pytest.mark.parametrize(
    "options", ["vmdk", "vmdk -o subformat=streamOptimized", "vpc", "vhdx", "vpc -o subformat=fixed"]
)
def test_made_by_qemu_and_cut(options: str, tmp_path: Path) -> None:
    """Half of a qemu-img image is refused as truncated, because its tables refer to missing parts."""
    (tmp_path / "in").write_bytes(NOISE + bytes(20 * MiB) + NOISE)
    qemu_img(f"convert -f raw -O {options} in out", tmp_path)
    image = (tmp_path / "out").read_bytes()
    with pytest.raises((CorruptImage, UnknownFormat), match=r"cut short|no disk image|is raw, but"):
        inspect(image[: len(image) // 2], "vhd" if "vpc" in options else "auto")


@pytest.mark.parametrize(
    "options", ["", "-c", "-c -o compression_type=zstd", "-o cluster_size=4k", "-o compat=0.10", "-o cluster_size=2M"]
)
def test_qcow2_cut_anywhere(options: str, tmp_path: Path) -> None:
    """A qcow2 without its last cluster or more is refused because its tables refer to missing parts."""
    (tmp_path / "in").write_bytes(NOISE + bytes(20 * MiB) + NOISE[: MiB + 512])
    qemu_img(f"convert -f raw -O qcow2 {options} in out", tmp_path)
    image, where = (tmp_path / "out").read_bytes(), random.Random(options)
    assert inspect(image).format == "qcow2"
    for _ in range(8):
        with pytest.raises(CorruptImage, match="cut short"):
            inspect(image[: where.randrange(512, len(image) - 2 * MiB)])


def test_qcow2_with_a_past(tmp_path: Path) -> None:
    """A qcow2 whose tables have moved, by snapshots and by growth, is accepted."""
    (tmp_path / "in").write_bytes(NOISE)
    qemu_img("convert -f raw -O qcow2 -o cluster_size=4k in out", tmp_path)
    for command in ("snapshot -c first out", "resize -q -f qcow2 out 40G", "snapshot -c second out"):
        qemu_img(command, tmp_path)
    info = inspect((tmp_path / "out").read_bytes())
    assert (info.virtual_size, info.details["snapshots"]) == (40 * GiB, 2)


def test_made_here(tmp_path: Path) -> None:
    """qemu-img accepts this suite's hand-made good images too."""
    images = {"qcow2": [qcow2(), qcow2(version=2)], "vmdk": [stream_optimized(NOISE, 4 * MiB)]}
    for name, each in ((name, each) for name, all_ in images.items() for each in all_):
        (tmp_path / "image").write_bytes(each)
        assert b"No errors" in qemu_img(f"check -f {name} image", tmp_path)
    (tmp_path / "raw").write_bytes(NOISE + bytes(2 * MiB))
    assert b"identical" in qemu_img("compare -f vmdk -F raw image raw", tmp_path)


@pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "isohybrid"])
def test_made_by_xorriso(hybrid: bool, tmp_path: Path) -> None:
    """A real ISO is accepted, also with a partition table in front, as distributions publish it."""
    if not shutil.which("xorriso"):
        missing("xorriso", "install xorriso")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(os.urandom(100_000))
    command = ["xorriso", "-as", "mkisofs", "-o", "out.iso", *(["-partition_offset", "16"] if hybrid else []), "tree"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    image = (tmp_path / "out.iso").read_bytes()
    assert (image[510:512] == b"\x55\xaa") == hybrid
    assert (inspect(image).format, inspect(image).virtual_size) == ("iso", len(image))


SEEDS = [
    qcow2(),
    qcow2(version=2),
    stream_optimized(NOISE[:70000]),
    vhd_dynamic(),
    vhdx(),
    iso(),
    gpt(),
    vhd_fixed(mbr()),
]


@given(seed=st.sampled_from(SEEDS), data=st.data())
@settings(max_examples=150)
def test_mutants(seed: bytes, data: st.DataObject) -> None:
    """An image with any changed structures gives a result or a WorkerError."""
    places = [0, 60, 512, 1024, 1536, 3 * 4096, 192 << 10, MiB, MiB + 65536, len(seed) - 1536, len(seed) - 512]
    near = st.builds(int.__add__, st.sampled_from(places), st.integers(0, 120)).filter(lambda at: at < len(seed))
    patches = data.draw(st.dictionaries(near, st.binary(min_size=1, max_size=8), min_size=1, max_size=4))
    assert verdict(overlay(seed, patches)[: data.draw(st.integers(0, len(seed) + 8))])
