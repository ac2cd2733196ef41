"""Images that real tools made and packed, through the whole job: the stored image has the right content."""

from __future__ import annotations

import json
import lzma
import random
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Manifest, read_manifest
from ssvm_worker.errors import ImageError, UnsafeImage
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.pipeline import read_bytes
from tests.archives import mf_of, ovf_of
from tests.attempts import attempt
from tests.neighbours import missing
from tests.servers.http import HttpServer

MIB = 1 << 20
NOISE = random.Random(6).randbytes(MIB)
#: qemu-img's name of a format, its options, and the packing.
VARIANTS = {
    "qcow2": ("qcow2", "-O qcow2", "gzip -k image"),
    "qcow2, old": ("qcow2", "-O qcow2 -o compat=0.10", "bzip2 -k image"),
    "qcow2, compressed by zlib": ("qcow2", "-c -O qcow2", "zip -q image.zip image"),
    "qcow2, compressed by zstd": ("qcow2", "-c -O qcow2 -o compression_type=zstd", "tar -cf image.tar image"),
    "vmdk of one file": ("vmdk", "-O vmdk", "xz -k -0 image"),
    "vmdk, stream optimized": ("vmdk", "-O vmdk -o subformat=streamOptimized", "zstd -q image"),
    "vhd": ("vpc", "-O vpc", "zstd -q --long=27 -3 image"),
    "vhdx": ("vhdx", "-O vhdx", "gzip -9 -k image"),
    "raw": ("raw", "-O raw", "xz -k -0 -T2 --block-size=1MiB image"),
    "raw in a stream of zip": ("raw", "-O raw", "sh -c 'zip -q - image > image.zip'"),
    "raw in GNU's tar": ("raw", "-O raw", "tar --format=gnu -cf image.tar ./image"),
    "raw as it is": ("raw", "-O raw", "cp image image.raw"),
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Return a folder with a raw disk of 9 MiB, of which 7 are empty."""
    for tool in ("qemu-img", "zstd", "xz", "zip"):
        if not shutil.which(tool):
            missing(tool, "install qemu-utils, zstd, xz-utils and zip")
    with (tmp_path / "disk").open("wb") as disk:
        disk.write(NOISE + bytes(7 * MIB) + NOISE)
    return tmp_path


def run(command: str, folder: Path) -> bytes:
    """Run a command in a folder, and return its standard output."""
    words = ["sh", "-c", command[7:-1]] if command.startswith("sh -c ") else command.split()
    while True:
        done = subprocess.run(words, cwd=folder, check=False, capture_output=True)
        # qemu-img measures its key derivation for LUKS. One measurement in ten fails with any options.
        if b"Unable to get accurate CPU usage" not in done.stderr:
            done.check_returncode()
            return done.stdout


def fetched(server: HttpServer, folder: Path, data: bytes, format_: str = "auto") -> tuple[Path, dict[str, Any]]:
    """Return the path of a download's image, and its result."""
    root = folder / "store"
    root.mkdir()
    asked = {"url": server.serve("image", data), "account": 2, "id": "7", "format": format_}
    result = download.run(parse_request(download.Request, asked, "download"), attempt(FileStore("primary", root)))
    return root / result["key"], result


def manifest_in(folder: Path) -> Manifest:
    """Return the manifest of the only download."""
    return read_manifest(FileStore("primary", folder / "store"), Artifact("template", "2", "7"))


@pytest.mark.parametrize(("name", "options", "pack"), VARIANTS.values(), ids=VARIANTS.keys())
def test_as_qemu_sees_it(http_server: HttpServer, made: Path, name: str, options: str, pack: str) -> None:
    """qemu-img finds the disk in the stored image, with the manifest's facts."""
    run(f"qemu-img convert -f raw {options} disk image", made)
    run(pack, made)
    packed = next(each for each in made.iterdir() if each.name.startswith("image."))

    image, result = fetched(http_server, made, packed.read_bytes())

    told = json.loads(run(f"qemu-img info --output=json -f {name} {image}", made))
    assert (result["format"], result["virtual_size"]) == (name.replace("vpc", "vhd"), told["virtual-size"])
    assert image.read_bytes() == (made / "image").read_bytes()
    assert b"identical" in run(f"qemu-img compare -f raw -F {name} disk {image}", made)


#: qemu-img's options for an image, and its format here. A fixed VHD is requested, because only its end differs from a
#: raw disk.
SUBFORMATS = {
    "qcow2 of version 2": ("qcow2 -o compat=0.10", "qcow2"),
    "qcow2 with clusters of 512 bytes": ("qcow2 -o cluster_size=512", "qcow2"),
    "qcow2 with clusters of 2 MiB": ("qcow2 -o cluster_size=2M", "qcow2"),
    "qcow2 with lazy refcounts": ("qcow2 -o lazy_refcounts=on", "qcow2"),
    "qcow2 with refcounts of a bit": ("qcow2 -o refcount_bits=1", "qcow2"),
    "qcow2 with refcounts of 64 bits": ("qcow2 -o refcount_bits=64", "qcow2"),
    **{
        f"qcow2, preallocated by {how}": (f"qcow2 -o preallocation={how}", "qcow2")
        for how in ("metadata", "falloc", "full")
    },
    "qcow2, compressed by zlib": ("qcow2 -c -o compression_type=zlib", "qcow2"),
    "qcow2, compressed by zstd": ("qcow2 -c -o compression_type=zstd,cluster_size=1M", "qcow2"),
    "vmdk monolithicSparse": ("vmdk -o subformat=monolithicSparse", "vmdk"),
    "vmdk of hardware 4": ("vmdk -o compat6=off,hwversion=4", "vmdk"),
    "vmdk of a SCSI adapter": ("vmdk -o compat6=on,adapter_type=lsilogic", "vmdk"),
    "vmdk with zeroed grains": ("vmdk -o zeroed_grain=on", "vmdk"),
    "vmdk streamOptimized": ("vmdk -o subformat=streamOptimized", "vmdk"),
    "vhd dynamic": ("vpc -o subformat=dynamic", "vhd"),
    "vhd dynamic, of the exact size": ("vpc -o subformat=dynamic,force_size=on", "vhd"),
    "vhd fixed": ("vpc -o subformat=fixed", "vhd"),
    "vhd fixed, of the exact size": ("vpc -o subformat=fixed,force_size=on", "vhd"),
    "vhdx dynamic": ("vhdx -o subformat=dynamic", "vhdx"),
    "vhdx fixed": ("vhdx -o subformat=fixed", "vhdx"),
    "vhdx with blocks of 8 MiB": ("vhdx -o block_size=8M,log_size=2M", "vhdx"),
    "raw": ("raw", "raw"),
    "raw, preallocated": ("raw -o preallocation=full", "raw"),
}


@pytest.mark.parametrize(("options", "name"), SUBFORMATS.values(), ids=SUBFORMATS.keys())
def test_manifest_agrees_with_qemu(http_server: HttpServer, made: Path, options: str, name: str) -> None:
    """The manifest agrees with qemu-img about every kind of image that qemu-img makes."""
    run(f"qemu-img convert -f raw -O {options} disk image", made)
    image, _ = fetched(http_server, made, (made / "image").read_bytes(), "vhd" if name == "vhd" else "auto")
    entry = manifest_in(made).entries[0]
    qemu = options.split()[0]
    told = json.loads(run(f"qemu-img info --output=json -f {qemu} {image}", made))
    special = told.get("format-specific", {}).get("data", {})

    assert entry.facts["format"] == name
    assert (entry.facts["virtual_size"], entry.size) == (told["virtual-size"], image.stat().st_size)
    assert entry.facts.get("create_type") == special.get("create-type")
    assert "backing-filename" not in told
    assert "data-file" not in special
    assert image.read_bytes() == (made / "image").read_bytes()
    assert b"identical" in run(f"qemu-img compare -f raw -F {qemu} disk {image}", made)


#: Images of qemu-img that are refused, with the word that gives the reason.
REFUSED = {
    "qcow2 -o extended_l2=on": "extended L2",
    "qcow2 -o data_file=data,data_file_raw=on": "another file",
    "vmdk -o subformat=monolithicFlat": "only a descriptor.* flat",
    "vmdk -o subformat=twoGbMaxExtentFlat": "only a descriptor.* flat",
    "vmdk -o subformat=twoGbMaxExtentSparse": "only a descriptor.* sparse",
    "qed": "QED",
    "qcow": "version 1",
    "vdi": "VirtualBox",
    "parallels": "Parallels",
}


@pytest.mark.parametrize(("options", "why"), REFUSED.items())
def test_refused_of_qemu(http_server: HttpServer, made: Path, options: str, why: str) -> None:
    """The error of an unsupported image of qemu-img has the name that qemu-img uses."""
    run(f"qemu-img create -q -f {options} image 4M", made)
    with pytest.raises(ImageError, match=why):
        fetched(http_server, made, (made / "image").read_bytes())


def test_encrypted_of_qemu(http_server: HttpServer, made: Path) -> None:
    """An encrypted qcow2 is refused, and so is the LUKS volume in it."""
    # Only one image: qemu-img measures its derivation of keys for two seconds.
    secret = "encrypt.iter-time=10,encrypt.key-secret=k --object secret,id=k,data=x"
    run(f"qemu-img create -q -f qcow2 -o encrypt.format=luks,{secret} image 4M", made)
    image = (made / "image").read_bytes()
    extension = image.index(struct.pack(">II", 0x0537BE77, 16))  # qcow2's pointer to the header of LUKS
    start, length = struct.unpack_from(">QQ", image, extension + 8)
    for name, data, why in (("qcow2", image, "encrypted"), ("luks", image[start : start + length], "LUKS")):
        (made / name).mkdir()
        with pytest.raises(ImageError, match=why):
            fetched(http_server, made / name, data)


#: Tools and options; the last makes the kind that distributions publish, an ISO with a partition table.
ISOS = {
    "genisoimage": "genisoimage -quiet -o image.iso tree",
    "genisoimage, UDF": "genisoimage -quiet -udf -o image.iso tree",
    "genisoimage, Rock Ridge and Joliet": "genisoimage -quiet -r -J -V LABEL -o image.iso tree",
    "genisoimage, level 3": "genisoimage -quiet -iso-level 3 -allow-limited-size -o image.iso tree",
    "genisoimage, level 4": "genisoimage -quiet -iso-level 4 -o image.iso tree",
    "genisoimage, El Torito": "genisoimage -quiet -b boot -no-emul-boot -boot-load-size 4 -o image.iso tree",
    "genisoimage, cloud-init's seed": "genisoimage -quiet -volid cidata -joliet -rock -o image.iso tree",
    "genisoimage, unpadded": "genisoimage -quiet -no-pad -o image.iso tree",
    "xorriso": "xorriso -as mkisofs -quiet -o image.iso tree",
    "xorriso, Rock Ridge and Joliet": "xorriso -as mkisofs -quiet -r -J -V LABEL -o image.iso tree",
    "xorriso, level 3": "xorriso -as mkisofs -quiet -iso-level 3 -o image.iso tree",
    "xorriso, zisofs": "xorriso -as mkisofs -quiet -z -o image.iso tree",
    "xorriso, El Torito": "xorriso -as mkisofs -quiet -b boot -no-emul-boot -o image.iso tree",
    "xorriso, native": "xorriso -outdev image.iso -map tree /",
    "xorriso, an MBR": "xorriso -as mkisofs -quiet -partition_offset 16 -o image.iso tree",
    "xorriso, a GPT": "xorriso -as mkisofs -append_partition 2 0xef disk -appended_part_as_gpt -o image.iso tree",
}


@pytest.mark.parametrize("command", ISOS.values(), ids=ISOS.keys())
def test_iso(http_server: HttpServer, made: Path, command: str) -> None:
    """An ISO of either tool is accepted, also compressed, with the size and files that other tools find."""
    for tool in ("genisoimage", "xorriso"):
        if not shutil.which(tool):
            missing(tool, f"install {tool}")
    (made / "tree").mkdir()
    (made / "tree" / "boot").write_bytes(NOISE)
    run(command, made)
    run("gzip -k image.iso", made)

    image, result = fetched(http_server, made, (made / "image.iso.gz").read_bytes())

    entry = manifest_in(made).entries[0]
    told = json.loads(run(f"qemu-img info --output=json -f raw {image}", made))
    assert (result["format"], entry.facts["virtual_size"]) == ("iso", told["virtual-size"])
    assert image.read_bytes() == (made / "image.iso").read_bytes()
    run(f"xorriso -osirrox on -indev {image} -extract / out", made)
    assert NOISE in [path.read_bytes() for path in (made / "out").iterdir()]


@pytest.mark.parametrize("name", ["v7", "oldgnu", "gnu", "ustar", "posix"])
@pytest.mark.parametrize("path", ["image", "./image"])
def test_tar(http_server: HttpServer, made: Path, name: str, path: str) -> None:
    """A disk in any kind of GNU tar is stored as the disk."""
    run(f"tar --format={name} -cf image.tar --transform=s,disk,{path},S disk", made)
    image, result = fetched(http_server, made, (made / "image.tar").read_bytes())
    assert (result["format"], manifest_in(made).source["wrapping"]) == ("raw", "tar")
    assert image.read_bytes() == (made / "disk").read_bytes()


def test_holes_stay_holes(http_server: HttpServer, made: Path) -> None:
    """The empty part of a compressed raw disk uses no space in a file store, and qemu-img sees its holes."""
    run("xz -k -0 disk", made)
    image, _ = fetched(http_server, made, (made / "disk.xz").read_bytes())
    assert image.stat().st_size == 9 * MIB
    assert image.stat().st_blocks * 512 == 2 * MIB
    extents = json.loads(run(f"qemu-img map --output=json -f raw {image}", made))
    assert [(each["length"] // MIB, each["data"]) for each in extents] == [(1, True), (7, False), (1, True)]


@pytest.mark.parametrize("subformat", ["streamOptimized", "monolithicSparse"])
def test_an_ova_by_tar(http_server: HttpServer, made: Path, subformat: str) -> None:
    """An OVA of two real disks is stored as two real disks."""
    for disk in ("a.vmdk", "b.vmdk"):
        run(f"qemu-img convert -f raw -O vmdk -o subformat={subformat} disk {disk}", made)
    (made / "vm.ovf").write_bytes(ovf_of("a.vmdk", "b.vmdk"))
    files = {name: (made / name).read_bytes() for name in ("vm.ovf", "a.vmdk", "b.vmdk")}
    (made / "vm.mf").write_bytes(mf_of(files, "sha1"))
    run("tar --format=ustar -cf vm.ova vm.ovf vm.mf a.vmdk b.vmdk", made)

    descriptor, result = fetched(http_server, made, (made / "vm.ova").read_bytes())

    assert (result["format"], result["virtual_size"]) == ("ova", 18 * MIB)
    for number in (0, 1):
        disk = descriptor.parent / f"7-disk{number}.vmdk"
        assert b"identical" in run(f"qemu-img compare -f raw -F vmdk disk {disk}", made)
        told = json.loads(run(f"qemu-img info --output=json -f vmdk {disk}", made))
        assert told["format-specific"]["data"]["create-type"] == subformat


def test_a_sparse_tar_is_refused(http_server: HttpServer, made: Path) -> None:
    """A sparse tar is refused, because only GNU tar reads it, and the error says how to pack it."""
    run("truncate -s 100M hole", made)
    run("tar -S --format=oldgnu -cf hole.tar hole", made)
    with pytest.raises(UnsafeImage, match=r"holds a sparse file.*Pack plain files"):
        fetched(http_server, made, (made / "hole.tar").read_bytes())


def test_manifest_of_a_real_one(http_server: HttpServer, made: Path) -> None:
    """The manifest has the compression and both sizes."""
    run("gzip -k disk", made)
    packed = (made / "disk.gz").read_bytes()
    image, result = fetched(http_server, made, packed)
    store = FileStore("primary", made / "store")
    manifest = manifest_in(made)
    assert (manifest.source["wrapping"], manifest.source["size"]) == ("gzip", len(packed))
    assert manifest.entries[0].size == len(read_bytes(store, result["key"])) == image.stat().st_size
    assert not tarfile.is_tarfile(image)


#: Bootable images in Debian packages; those for a floppy and a USB stick are ISOs too.
PACKAGED = {
    "/usr/lib/grub-rescue/grub-rescue-cdrom.iso": "grub-rescue-pc",
    "/usr/lib/grub-rescue/grub-rescue-floppy.img": "grub-rescue-pc",
    "/usr/lib/grub-rescue/grub-rescue-usb.img": "grub-rescue-pc",
    "/usr/lib/ipxe/ipxe.iso": "ipxe",
    "/usr/lib/memtest86+/memtest86+x64.iso": "memtest86+",
    "/usr/lib/memtest86+/memtest86+ia32.iso": "memtest86+",
}


@pytest.mark.parametrize(("path", "package"), PACKAGED.items())
def test_packaged(http_server: HttpServer, tmp_path: Path, path: str, package: str) -> None:
    """A bootable image is accepted plain and compressed, with its partition table and qemu-img's size."""
    if not Path(path).exists() or not shutil.which("qemu-img"):
        missing(path, f"apt-get install {package} qemu-utils")
    data = Path(path).read_bytes()
    for number, offered in enumerate((data, lzma.compress(data, preset=0))):
        (folder := tmp_path / str(number)).mkdir()
        image, result = fetched(http_server, folder, offered)
        told = json.loads(run(f"qemu-img info --output=json -f raw {image}", folder))
        assert image.read_bytes() == data
        assert (result["format"], result["virtual_size"]) == ("iso", told["virtual-size"])
