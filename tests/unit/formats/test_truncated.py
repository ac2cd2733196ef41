"""One rule for all formats: a complete image is accepted, and a truncated one is refused.

The worker's own parsers do not determine the used bytes. The last used byte is the last one that is not zero, if
qemu-img finds the image without it damaged. Damaged means that qemu-img does not open it, reads other bytes, or finds
other errors. Otherwise the end of the shortest undamaged image counts. The last non-zero byte counts for an ISO, a raw
disk and a sparse disk of many GiB.
The comparison of such a sparse disk with qemu-img takes minutes.
"""

from __future__ import annotations

import functools
import hashlib
import random
import shlex
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssvm_worker.errors import CorruptImage, ImageError
from ssvm_worker.formats import ImageInfo, Inspection
from ssvm_worker.formats.writers.qcow2 import most_clusters, qcow2
from ssvm_worker.formats.writers.vmdk import stream_optimized
from ssvm_worker.units import KiB, MiB, TiB
from tests.images import gpt, mbr, overlay, vhdx
from tests.images import iso as isofs
from tests.neighbours import missing

RANDOM = random.Random(15)
NOISE = RANDOM.randbytes(2 * MiB)
#: 8 MiB and five sectors: a multiple of no cluster but that of 512 bytes.
DISK = NOISE[:MiB] + bytes(5 * MiB) + NOISE + NOISE[: 5 * 512]
#: Bytes before the last used one where an image is cut. Some positions are chosen at random too.
CUTS = (1, 300, 4096, 65536, 1_500_000)


@dataclass(frozen=True)
class Recipe:
    """The parameters of an image for qemu-img and qemu-io."""

    #: qemu's name of the format.
    format: str
    commands: str
    #: Content of the image besides the disk.
    snapshots: tuple[str, ...] = ()
    #: Whether the disk is too large to compare.
    large: bool = False

    @property
    def ours(self) -> str:
        """Return the worker's name of the format."""
        return "vhd" if self.format == "vpc" else self.format


def convert(format_: str, options: str = "") -> Recipe:
    """Convert the disk to another format."""
    return Recipe(format_, f"qemu-img convert -f raw -O {format_} {options} disk image")


def grown(
    format_: str, options: str, size: str, *steps: str, snapshots: tuple[str, ...] = (), large: bool = False
) -> Recipe:
    """Make an empty disk and use it: steps are commands of qemu-io, or of qemu-img with its prefix."""
    commands = [f"qemu-img create -q -f {format_} {options} image {size}"]
    for step in steps:
        commands.append(step if step.startswith("qemu-img") else f'qemu-io -f {format_} -d unmap -c "{step}" image')
    return Recipe(format_, "\n".join(commands), snapshots, large)


#: qemu-io ends like a failing host: unflushed data is lost.
KILLED = 'write -q -P 4 0 1M" -c flush -c "write -q -P 5 9M 1M" -c "sigraise 9'
RECIPES = {
    "qcow2": convert("qcow2"),
    "qcow2 of version 2": convert("qcow2", "-o compat=0.10"),
    "qcow2, clusters of 512 bytes": convert("qcow2", "-o cluster_size=512"),
    "qcow2, clusters of 4 KiB": convert("qcow2", "-o cluster_size=4k"),
    "qcow2, clusters of 2 MiB": convert("qcow2", "-o cluster_size=2M"),
    "qcow2, refcounts of a bit": convert("qcow2", "-o refcount_bits=1"),
    "qcow2, refcounts of 64 bits": convert("qcow2", "-o refcount_bits=64,cluster_size=4k"),
    "qcow2, lazy refcounts": convert("qcow2", "-o lazy_refcounts=on"),
    "qcow2, zlib": convert("qcow2", "-c"),
    "qcow2, zlib, clusters of 4 KiB": convert("qcow2", "-c -o cluster_size=4k"),
    "qcow2, zlib, version 2": convert("qcow2", "-c -o compat=0.10"),
    "qcow2, zstd": convert("qcow2", "-c -o compression_type=zstd"),
    "qcow2, zstd, clusters of 2 MiB": convert("qcow2", "-c -o compression_type=zstd,cluster_size=2M"),
    "qcow2, metadata preallocated": convert("qcow2", "-o preallocation=metadata"),
    "qcow2, allocated": convert("qcow2", "-o preallocation=falloc"),
    "qcow2, written": convert("qcow2", "-o preallocation=full"),
    "qcow2, empty": grown("qcow2", "", "10M"),
    "qcow2, preallocated and used": grown("qcow2", "-o preallocation=metadata", "10M", "write -q -P 1 9M 1M"),
    "qcow2, written backwards": grown("qcow2", "", "3G", "write -q -P 1 2G 2M", "write -q -P 2 0 2M"),
    "qcow2, compressed behind": grown("qcow2", "", "9M", "write -q -P 1 0 4M", "write -q -c -s half 8M 64k"),
    "qcow2, zstd behind": grown(
        "qcow2", "-o compression_type=zstd", "9M", "write -q -P 1 0 4M", "write -q -c -s half 8M 64k"
    ),
    "qcow2, discarded": grown("qcow2", "", "9M", "write -q -P 1 0 9M", "discard -q 4M 5M"),
    "qcow2, zeroed": grown("qcow2", "", "9M", "write -q -P 1 0 9M", "write -q -z 4M 5M"),
    "qcow2, a snapshot": grown(
        "qcow2", "-o cluster_size=4k", "9M", "write -q -P 1 0 3M", "qemu-img snapshot -c one image", snapshots=("one",)
    ),
    "qcow2, snapshots in use": grown(
        "qcow2", "", "9M", "write -q -P 1 0 3M", "qemu-img snapshot -c one image", "write -q -P 2 2M 3M",
        "qemu-img snapshot -c two image", "write -q -P 3 0 8M", snapshots=("one", "two"),
    ),
    "qcow2, data of a snapshot alone": grown(
        "qcow2", "-o cluster_size=64k", "9M", "write -q -P 1 0 3M", "discard -q 0 1M", "write -q -P 1 4M 3M",
        "qemu-img snapshot -c one image", "discard -q 4M 5M", snapshots=("one",),
    ),
    "qcow2, a snapshot less": grown(
        "qcow2", "", "9M", "write -q -P 1 0 3M", "qemu-img snapshot -c one image", "write -q -P 2 0 3M",
        "qemu-img snapshot -d one image",
    ),
    "qcow2, a bitmap": grown("qcow2", "", "9M", "qemu-img bitmap --add image dirty", "write -q -P 1 0 3M"),
    "qcow2, L1 moved behind its L2": grown(
        "qcow2", "-o cluster_size=4k", "4M", "write -q -P 1 0 2M", "qemu-img resize -q -f qcow2 image 40G",
        "write -q -P 2 3M 512k",
    ),
    "qcow2, L1 moved, then a snapshot": grown(
        "qcow2", "-o cluster_size=4k", "4M", "write -q -P 1 0 2M", "qemu-img resize -q -f qcow2 image 40G",
        "write -q -P 2 3M 512k", "qemu-img snapshot -c one image", "discard -q 3M 1M", snapshots=("one",),
    ),
    "qcow2, refcount table moved": grown(
        "qcow2", "-o cluster_size=512", "20M", "write -q -P 1 0 11M", "qemu-img snapshot -c one image",
        "discard -q 6M 5M", snapshots=("one",),
    ),
    "qcow2, grown by an odd size": grown(
        "qcow2", "", "4195328", "write -q -P 1 0 4195328", "qemu-img resize -q -f qcow2 image 6M"
    ),
    "qcow2, killed": grown("qcow2", "", "10M", KILLED),
    "qcow2, killed with lazy refcounts": grown("qcow2", "-o lazy_refcounts=on", "10M", KILLED),
    "qcow2, a long L1 table": grown("qcow2", "-o cluster_size=4k", "1100G", "write -q -P 1 1T 2M", large=True),
    "qcow2, padded": Recipe("qcow2", convert("qcow2").commands + "\ntruncate -s +1M image"),
    "vmdk": convert("vmdk"),
    "vmdk with zeroed grains": grown("vmdk", "-o zeroed_grain=on", "9M", "write -q -P 1 0 4M", "write -q -z 1M 2M"),
    "vmdk, written backwards": grown("vmdk", "", "3G", "write -q -P 1 2G 2M", "write -q -P 2 0 2M"),
    "vmdk of 100 GiB": grown("vmdk", "", "100G", "write -q -P 1 50G 2M", "write -q -P 2 99G 2M", large=True),
    "vmdk, streamOptimized": convert("vmdk", "-o subformat=streamOptimized"),
    "vhdx": convert("vhdx"),
    "vhdx, blocks of 1 MiB": convert("vhdx", "-o block_size=1M"),
    "vhdx, blocks of 64 MiB": convert("vhdx", "-o block_size=64M"),
    "vhdx, fixed": convert("vhdx", "-o subformat=fixed"),
    "vhdx, fixed, blocks of 1 MiB": convert("vhdx", "-o subformat=fixed,block_size=1M"),
    "vhdx of 200 GiB": grown(
        "vhdx", "-o block_size=1M", "200G", "write -q -P 1 0 2M", "write -q -P 2 199G 2M", large=True
    ),
    "vhd": convert("vpc"),
    "vhd of the exact size": convert("vpc", "-o force_size=on"),
    "vhd, fixed": convert("vpc", "-o subformat=fixed"),
    "vhd of 2000 GiB": grown("vpc", "", "2000G", "write -q -P 1 1999G 2M", "write -q -P 2 0 2M", large=True),
    "our qcow2": Recipe("qcow2", ""),
    "our vmdk": Recipe("vmdk", ""),
}  # fmt: skip


def run(command: list[str], folder: Path) -> int:
    """Return the exit status of a command."""
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode


def inspect(image: bytes, expected: str) -> ImageInfo:
    """Return the inspection of an image."""
    inspection = Inspection(expected, 64 * TiB, "disk.img")
    for at in range(0, len(image), MiB):
        inspection(image[at : at + MiB])
    return inspection.finish()


def make(recipe: Recipe, folder: Path) -> bytes:
    """Return the image of a recipe."""
    for tool in ("qemu-img", "qemu-io"):
        if not shutil.which(tool):
            missing(tool, "install qemu-utils")
    (folder / "disk").write_bytes(DISK)
    (folder / "half").write_bytes(NOISE[:40_000].ljust(64 * KiB, b"\0"))
    if not recipe.commands:
        grains = ((at, DISK[at : at + 64 * KiB]) for at in range(0, len(DISK), 64 * KiB))
        extents = ((at, data) for at, data in grains if any(data))
        if recipe.format == "qcow2":
            pieces = qcow2(extents, len(DISK), most_clusters(len(DISK), 4 * MiB, 64 * KiB), "disk")
        else:
            pieces = stream_optimized(extents, len(DISK), "disk.vmdk")
        (folder / "image").write_bytes(b"".join(pieces))
    for command in recipe.commands.splitlines():
        status = run(shlex.split(command), folder)
        assert status == (-9 if "sigraise" in command else 0), command
    return (folder / "image").read_bytes()


def last_used(recipe: Recipe, image: bytes, folder: Path) -> int:
    """Return the end of the last used byte, as the module defines it."""
    cut = folder / "cut"
    used = len(image.rstrip(b"\0"))
    if recipe.large:
        return used

    @functools.cache
    def seen(size: int) -> list[object]:
        cut.write_bytes(image[:size])
        told: list[object] = [
            run(["qemu-img", "compare", "-f", recipe.format, "-F", recipe.format, "image", "cut"], folder),
            run(["qemu-img", "check", "-f", recipe.format, "cut"], folder),
        ]
        for name in recipe.snapshots:
            (folder / "out").unlink(missing_ok=True)
            run(["qemu-img", "convert", "-f", recipe.format, "-l", name, "-O", "qcow2", "cut", "out"], folder)
            data = (folder / "out").read_bytes() if (folder / "out").exists() else b""
            told.append(hashlib.sha256(data).hexdigest())
        return told

    if seen(used - 1) != seen(len(image)):
        return used
    damaged, good = 0, used - 1
    while good - damaged > 1:
        middle = (damaged + good) // 2
        if seen(middle) == seen(len(image)):
            good = middle
        else:
            damaged = middle
    return good


def refuse_all_cuts(image: bytes, used: int, expected: str) -> None:
    """Check that exactly the cuts before the last used byte are refused."""
    assert inspect(image, expected).physical_size == len(image)
    places = [used - cut for cut in CUTS] + [RANDOM.randrange(used) for _ in range(5)]
    taken = []
    for size in filter(lambda each: each > 0, places):
        try:
            inspect(image[:size], expected)
        except ImageError:
            continue
        taken.append(used - size)
    assert not taken, f"of {len(image)} bytes, {used} used, these are missing: {taken}"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_cut(recipe: Recipe, tmp_path: Path) -> None:
    """An image that a reader finds damaged by a cut is refused, and the complete one is accepted."""
    image = make(recipe, tmp_path)
    refuse_all_cuts(image, last_used(recipe, image, tmp_path), recipe.ours)


TREE = "tree"
ISOS = {
    "genisoimage": "genisoimage -quiet -o image tree",
    "genisoimage, unpadded": "genisoimage -quiet -no-pad -o image tree",
    "genisoimage, UDF": "genisoimage -quiet -udf -no-pad -o image tree",
    "genisoimage, Rock Ridge and Joliet": "genisoimage -quiet -r -J -o image tree",
    "xorriso": "xorriso -as mkisofs -quiet -o image tree",
    "xorriso, unpadded": "xorriso -as mkisofs -quiet -no-pad -o image tree",
    "xorriso, native": "xorriso -outdev image -map tree /",
    "xorriso, an MBR": "xorriso -as mkisofs -quiet -partition_offset 16 -o image tree",
    "xorriso, a partition behind": "xorriso -as mkisofs -quiet -append_partition 2 0xef disk -o image tree",
    "xorriso, a GPT": "xorriso -as mkisofs -append_partition 2 0xef disk -appended_part_as_gpt -o image tree",
}


def iso(command: str, folder: Path) -> bytes:
    """Return an ISO of a folder with one file."""
    for tool in ("genisoimage", "xorriso"):
        if not shutil.which(tool):
            missing(tool, f"install {tool}")
    (folder / TREE).mkdir()
    (folder / TREE / "file").write_bytes(NOISE)
    (folder / "disk").write_bytes(DISK)
    assert run(command.split(), folder) == 0
    return (folder / "image").read_bytes()


@pytest.mark.parametrize("command", ISOS.values(), ids=ISOS.keys())
def test_iso(command: str, tmp_path: Path) -> None:
    """An ISO that lacks a byte of its volume or of a partition after it is refused."""
    image = iso(command, tmp_path)
    refuse_all_cuts(image, len(image.rstrip(b"\0")), "iso")


def test_udf_alone(tmp_path: Path) -> None:
    """A UDF image without an ISO 9660 volume that lacks a byte is refused."""
    image = iso(ISOS["genisoimage, UDF"], tmp_path)
    descriptors = {at: b"\0" * 2048 for at in range(32768, 32768 + 8 * 2048, 2048) if image[at + 1 :][:5] == b"CD001"}
    alone = overlay(image, descriptors | {32768: b"\0BEA01\x01"})
    assert inspect(alone, "iso").details == {"subformat": "udf"}
    refuse_all_cuts(alone, len(alone.rstrip(b"\0")), "iso")


def test_primary_descriptor_behind_another(tmp_path: Path) -> None:
    """An ISO whose first descriptor is not the primary one is as long as the primary one says."""
    image = iso(ISOS["genisoimage, unpadded"], tmp_path)
    primary, end = image[32768:][:2048], image[32768 + 2048 :][:2048]
    moved = overlay(image, {32768: b"\0CD001\x01".ljust(2048, b"\0"), 32768 + 2048: primary, 32768 + 4096: end})
    refuse_all_cuts(moved, len(moved.rstrip(b"\0")), "iso")


@pytest.mark.parametrize("sector", [512, 4096])
def test_gpt(sector: int) -> None:
    """A raw disk that lacks a byte of its second GPT is refused."""
    image = gpt(4 * MiB, sector)
    refuse_all_cuts(image, len(image.rstrip(b"\0")), "raw")


#: Images with empty allocated units: the file must have them, although qemu-img reads zeros after its end.
RESERVED = {
    "qcow2": grown("qcow2", "-o preallocation=metadata", "10M"),
    "qcow2, allocated": grown("qcow2", "-o preallocation=falloc", "10M"),
    "qcow2, zeroed": grown("qcow2", "", "9M", "write -q -P 1 0 9M", "write -q -z 4M 5M"),
    "vhdx": grown("vhdx", "-o block_size=8M", "12M", "write -q -P 1 8M 1M"),
    "vhdx, fixed": grown("vhdx", "-o subformat=fixed,block_size=1M", "12M", "write -q -P 1 11M 512"),
    "vhd": grown("vpc", "", "10M", "write -q -P 1 6M 1M"),
    "vmdk": grown("vmdk", "", "10M", "write -q -P 1 0 512"),
}


@pytest.mark.parametrize("recipe", RESERVED.values(), ids=RESERVED.keys())
def test_reserved(recipe: Recipe, tmp_path: Path) -> None:
    """An empty allocated unit is completely in the file, or the image is refused."""
    image = make(recipe, tmp_path)
    refuse_all_cuts(image, len(image), recipe.ours)


#: The bytes of the disk in its last unit of 64 KiB. The file needs no more.
REST = 2 * KiB + 512


@pytest.mark.parametrize("recipe", [grown("qcow2", "", str(4 * MiB + REST), f"write -q -P 1 0 {4 * MiB + REST}"),
                                    grown("vmdk", "", str(4 * MiB + REST), f"write -q -P 1 0 {4 * MiB + REST}")],
                         ids=["qcow2", "vmdk"])  # fmt: skip
def test_short_last_unit(recipe: Recipe, tmp_path: Path) -> None:
    """The last unit may end exactly where the disk ends, and not a byte earlier."""
    image = make(recipe, tmp_path)
    short = image[: len(image.rstrip(b"\0"))]
    assert len(image) - len(short) == 64 * KiB - REST
    refuse_all_cuts(short, len(short), recipe.ours)


@pytest.mark.parametrize(("said", "complete"), [(4 * MiB, True), (6 * MiB, False)])
def test_log(said: int, complete: bool) -> None:
    """A VHDX with a log must have its whole log and the size that its newest entry declares."""
    guid = bytes(range(16))
    entries = {
        at: struct.pack("<4sIIIQQ16sQQ", b"loge", 0, 4096, 0, number, 0, guid, size, size)
        for at, number, size in ((3 * MiB, 7, said), (3 * MiB + 4096, 6, 9 * MiB))
    }
    header = struct.pack("<4sIQ32x16s4xIQ", b"head", 0, 1, guid, MiB, 3 * MiB)
    image = overlay(vhdx(), {64 * KiB: header, 4 * MiB - 1: b"\0", **entries})
    if complete:
        refuse_all_cuts(image, len(image), "vhdx")
    else:
        with pytest.raises(CorruptImage, match="ends at offset 6291456, or its log says so"):
            inspect(image, "vhdx")


def test_redundant_directory_at_the_end(tmp_path: Path) -> None:
    """A VMDK whose redundant grain directory is cut is refused, although qemu reads the first one."""
    image = make(RECIPES["vmdk"], tmp_path)
    directory = image[struct.unpack_from("<Q", image, 48)[0] * 512 :][:4]  # one grain table holds the disk
    moved = overlay(image, {48: struct.pack("<Q", len(image) // 512), len(image): directory})
    (tmp_path / "image").write_bytes(moved)
    assert run(["qemu-img", "compare", "-f", "vmdk", "-F", "raw", "image", "disk"], tmp_path) == 0
    refuse_all_cuts(moved, len(moved), "vmdk")


def warned(image: bytes, expected: str) -> object:
    """Return the warnings about an accepted image."""
    return inspect(image, expected).details.get("warnings")


def test_warnings() -> None:
    """If missing bytes cannot be excluded, the facts have a warning."""
    assert warned(mbr(4 * MiB), "raw") is None
    assert "A partition ends at offset 4194304, the disk at 2097152" in str(warned(mbr(4 * MiB)[: 2 * MiB], "raw"))
    no_anchor = overlay(isofs(1000), {32768: b"\0BEA01\x01"})
    assert "end of the UDF volume is unknown" in str(warned(no_anchor, "iso"))
    with pytest.raises(CorruptImage, match="UDF has an anchor"):
        inspect(no_anchor[: 100 * KiB], "iso")
    bridge = overlay(isofs(1000), {32768 + 4096: b"\0NSR02\x01"})
    assert "end of the UDF volume is unknown" in str(warned(bridge, "iso"))


def test_warning_of_a_dirty_image(tmp_path: Path) -> None:
    """A qcow2 that was not closed may have wrong refcounts, so data of only a snapshot causes a warning."""
    name = "qcow2, data of a snapshot alone"
    commands = RECIPES[name].commands.replace("-o ", "-o lazy_refcounts=on,")
    killed = f'{commands}\nqemu-io -f qcow2 -d unmap -c "write -q -P 5 1M 64k" -c "sigraise 9" image'
    assert RECIPES[name].commands != commands
    image = make(Recipe("qcow2", killed, ("one",)), tmp_path)
    assert "refcounts may be wrong" in str(warned(image, "qcow2"))
    assert warned(make(RECIPES[name], tmp_path), "qcow2") is None
    assert warned(make(RECIPES["qcow2, killed with lazy refcounts"], tmp_path), "qcow2") is None


@pytest.mark.parametrize("name", ["qcow2, compressed behind", "qcow2, zstd behind"])
def test_unfilled_sector(name: str, tmp_path: Path) -> None:
    """The last compressed cluster may end anywhere in its last sector, if its data is complete."""
    image = make(RECIPES[name], tmp_path)
    assert len(image) % 512
    assert inspect(image, "qcow2").format == "qcow2"
    assert inspect(image + bytes(-len(image) % 512), "qcow2").format == "qcow2"
    with pytest.raises(CorruptImage, match="last cluster"):
        inspect(image[:-4], "qcow2")
