"""OVAs: the descriptor is read safely, the members are streamed to the stores, and all are stored or none."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import find_manifest, read_manifest
from ssvm_worker.errors import (
    ChecksumMismatch,
    CorruptImage,
    InvalidRequest,
    StoreFull,
    TooLarge,
    UnknownFormat,
    UnsafeImage,
    WorkerError,
)
from ssvm_worker.formats import ova
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from tests.archives import COMPRESS, mf_of, ova_of, ovf_of, tar_member, tar_of
from tests.attempts import attempt
from tests.images import iso, mbr, qcow2, stream_optimized, vmdk_descriptor
from tests.servers.http import HttpServer

DISK = stream_optimized(random.Random(5).randbytes(300_000))
DATA = stream_optimized(b"", 1 << 30)
OVF = ovf_of("vm-disk1.vmdk", "vm-disk2.vmdk", others=("vm.nvram",))
FILES = {"vm.ovf": OVF, "vm-disk1.vmdk": DISK, "vm.nvram": b"nvram", "vm-disk2.vmdk": DATA}
PREFIX = "template/tmpl/2/7"


def with_mf(files: dict[str, bytes], algorithm: str = "sha256", last: bool = False) -> dict[str, bytes]:
    """Return the package's files with their checksums, behind the descriptor or at the end."""
    mf = {"vm.mf": mf_of(files, algorithm)}
    return files | mf if last else dict(list(files.items())[:1]) | mf | files


def run(server: HttpServer, package: bytes, *stores: Any, **fields: Any) -> dict[str, Any]:
    """Download a package."""
    asked = {"url": server.serve("vm.ova", package), "account": 2, "id": "7"} | fields
    return download.run(parse_request(download.Request, asked, "download"), attempt(*stores))


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("last", [False, True], ids=["mf second", "mf last"])
def test_unpacked(http_server: HttpServer, tmp_path: Path, algorithm: str, last: bool) -> None:
    """The disks are beside the descriptor under new names, and the descriptor and checksums have these names."""
    store, package = FileStore("primary", tmp_path), ova_of(with_mf(FILES, algorithm, last))

    result = run(http_server, package, store, checksum=hashlib.sha256(package).hexdigest(), format="ova")

    names = ["7-disk0.vmdk", "7-disk1.vmdk", "7-file0", "7.mf", "7.ovf", "manifest.json", "template.properties"]
    assert [each.key for each in store.list()] == [f"{PREFIX}/{name}" for name in names]
    assert [read_bytes(store, f"{PREFIX}/{name}") for name in names[:3]] == [DISK, DATA, b"nvram"]
    stored = {name: read_bytes(store, f"{PREFIX}/{name}") for name in ("7.ovf", *names[:3])}
    assert ova.read_descriptor(stored["7.ovf"], "") == ova.Descriptor(("7-disk0.vmdk", "7-disk1.vmdk"), ("7-file0",))
    assert {name: each.hex for name, each in ova.read_checksums(read_bytes(store, f"{PREFIX}/7.mf"), "").items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in stored.items()
    }
    assert (result["format"], result["key"]) == ("ova", f"{PREFIX}/7.ovf")
    assert result["virtual_size"] == (1 << 30) + 300_032


def test_properties(http_server: HttpServer) -> None:
    """CloudStack finds an OVA by the package's name and size, and the manifest has its digest."""
    store, package = MemoryStore("primary"), ova_of(FILES)
    run(http_server, package, store, name="VM")
    lines = read_bytes(store, f"{PREFIX}/template.properties").decode().splitlines()
    assert {"ova=true", "ova.filename=7.ova", f"ova.size={len(package)}", "filename=7.ova"} <= set(lines)
    manifest = read_manifest(store, Artifact("template", "2", "7"))
    assert manifest.source["digests"] == [f"sha256:{hashlib.sha256(package).hexdigest()}"]
    assert [each.role for each in manifest.entries[:3]] == ["descriptor", "disk", "disk"]


def test_every_object_is_listed(http_server: HttpServer) -> None:
    """The manifest lists every object with its stored size and digest."""
    store = MemoryStore("primary")
    run(http_server, ova_of(FILES), store)
    manifest = read_manifest(store, Artifact("template", "2", "7"))
    for entry in manifest.entries:
        data = read_bytes(store, f"{PREFIX}/{entry.name}")
        assert (entry.size, entry.digest) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert {each.name for each in manifest.entries} | {"manifest.json"} == {
        each.key.rpartition("/")[2] for each in store.list()
    }


def test_macos(http_server: HttpServer) -> None:
    """The extra files of macOS's tar are not stored."""
    doubles = {name: data for each, whole in FILES.items() for name, data in ((f"._{each}", b"?"), (each, whole))}
    assert run(http_server, ova_of(doubles), MemoryStore("primary"))["format"] == "ova"


def test_mf_in_itself(http_server: HttpServer) -> None:
    """A checksum file that lists itself is accepted, because a file cannot have its own digest."""
    files = with_mf(FILES)
    name = next(each for each in files if each.endswith(".mf"))
    itself = f"SHA256({name})= {hashlib.sha256().hexdigest()}\n".encode()
    assert run(http_server, ova_of(files | {name: files[name] + itself}), MemoryStore("primary"))["format"] == "ova"


def test_no_blocks_at_the_end(http_server: HttpServer) -> None:
    """A package with a checksum file may lack zero blocks at its end, and one without it may not."""

    def unended(files: dict[str, bytes]) -> bytes:
        return ova_of(files)[: sum(512 + len(data) + -len(data) % 512 for data in files.values())]

    assert run(http_server, unended(with_mf(FILES)), MemoryStore("primary"))["format"] == "ova"
    store = MemoryStore("primary")
    with pytest.raises(CorruptImage, match="cut short"):
        run(http_server, unended(FILES), store)
    assert not [each for each in store.list() if each.key.endswith("manifest.json")]


@pytest.mark.parametrize("signed", [True, False])
def test_signature_is_not_verified(http_server: HttpServer, signed: bool) -> None:
    """The manifest says that a certificate was not verified, and the certificate is not stored."""
    store, cert = MemoryStore("primary"), {"vm.cert": b"SHA256(vm.mf)= 00\n"} if signed else {}
    result = run(http_server, ova_of(with_mf(FILES) | cert), store)
    manifest = read_manifest(store, Artifact("template", "2", "7"))
    assert manifest.entries[0].facts.get("signature") == ("unverified" if signed else None)
    assert not [name for name in result["objects"] if name.endswith("cert")]


def test_verified(http_server: HttpServer) -> None:
    """The verify job reads every object of a package, and finds a damaged one."""
    store = MemoryStore("primary")
    run(http_server, ova_of(FILES), store)
    asked = parse_request(verify.Request, {"account": 2, "id": "7"}, "verify")
    assert verify.run(asked, attempt(store))["objects"] == 6
    put_bytes(store, f"{PREFIX}/7-disk1.vmdk", DISK, Owner())
    with pytest.raises(CorruptImage, match=r"7-disk1\.vmdk"):
        verify.run(asked, attempt(store))


def test_the_same_again(http_server: HttpServer) -> None:
    """A repeated download of an OVA is answered from its manifest."""
    store = MemoryStore("primary")
    first = run(http_server, ova_of(FILES), store)
    assert run(http_server, ova_of(FILES), store) == first | {"reused": True}


def changed(**files: bytes) -> bytes:
    """Return the package with other content of some files; a dot in a name is written as two underscores."""
    return ova_of(FILES | {name.replace("__", ".").replace("_", "-"): data for name, data in files.items()})


OUTSIDE = vmdk_descriptor(8, createType='"monolithicFlat"', extent='RW 8 FLAT "/etc/passwd" 0')
LIAR = with_mf(FILES) | {"vm-disk2.vmdk": stream_optimized(b"x" * 600)}
BAD = {
    "a second disk that points outside": (changed(vm_disk2__vmdk=OUTSIDE), UnsafeImage, "vm-disk2.vmdk"),
    "a disk that is none": (changed(vm_disk2__vmdk=b"x" * 600), UnknownFormat, "but vmdk was asked for"),
    "a disk of another format": (changed(vm_disk1__vmdk=qcow2()), UnknownFormat, "is qcow2, but vmdk"),
    "a checksum that is wrong": (ova_of(LIAR), ChecksumMismatch, "vm-disk2.vmdk"),
    "a checksum that is wrong, at the end": (
        ova_of({name: data for name, data in LIAR.items() if name != "vm.mf"} | {"vm.mf": mf_of(FILES)}),
        CorruptImage,
        "'vm-disk2.vmdk' has sha256:",
    ),
    "a checksum of nothing": (ova_of(with_mf(FILES) | {"vm.mf": mf_of(FILES | {"x": b""})}), CorruptImage, "missing"),
    "a descriptor that was changed": (
        ova_of(with_mf(FILES) | {"vm.ovf": OVF + b"\n"}),
        CorruptImage,
        "'vm.ovf' has sha256:",
    ),
    "checksums that leave one out": (ova_of(FILES | {"vm.mf": mf_of({"vm.ovf": OVF})}), UnknownFormat, "does not list"),
    "checksums of no form": (ova_of(FILES | {"vm.mf": b"MD5(x)= 00"}), CorruptImage, "no known form or algorithm"),
    "a disk that is missing": (ova_of(dict(list(FILES.items())[:3])), CorruptImage, "lacks a file.*vm-disk2.vmdk"),
    "a member that nobody names": (ova_of(FILES | {"x.sh": b""}), UnsafeImage, "no OVF names: 'x.sh'"),
    "two signatures": (ova_of(FILES | {"a.cert": b"", "b.cert": b""}), UnsafeImage, "a second .* signature"),
    "two descriptors": (ova_of(FILES | {"x.ovf": OVF}), UnsafeImage, "a second descriptor"),
    "a large file that is no disk": (changed(vm__nvram=bytes(17 << 20)), TooLarge, "which is not a disk"),
    "a huge descriptor": (changed(vm__ovf=OVF + b" " * (1 << 20)), TooLarge, "'vm.ovf'"),
    "its descriptor not first": (ova_of({"vm-disk1.vmdk": DISK} | FILES), UnknownFormat, "several members"),
    "no descriptor": (ova_of({"a.vmdk": DISK, "b.vmdk": DISK}), UnknownFormat, "several members.*is not an OVA"),
    "a link for a disk": (
        tar_of(tar_member("vm.ovf", OVF), tar_member("vm-disk1.vmdk", kind=b"2", linkname="/etc/passwd")),
        UnsafeImage,
        "symbolic link",
    ),
    "nothing": (tar_of() + bytes(1 << 20), UnknownFormat, "no disk image|raw"),
    "half of it": (ova_of(FILES)[: len(OVF) + 200_000], CorruptImage, "cut short"),
}


@pytest.mark.parametrize(("package", "error", "text"), BAD.values(), ids=BAD.keys())
def test_refused(http_server: HttpServer, package: bytes, error: type[WorkerError], text: str) -> None:
    """A package with a bad member leaves nothing, and the error names the member."""
    store = MemoryStore("primary")
    with pytest.raises(error, match=text):
        run(http_server, package, store, format="auto" if text != "no disk image|raw" else "vmdk")
    asked = parse_request(download.Request, {"url": "http://x/y", "account": 2, "id": 7}, "")
    assert find_manifest(store, asked.artifact) is None
    download.discard(asked, attempt(store))
    assert ([*store.list()], store.sweep(0)) == ([], 0)


@pytest.mark.parametrize("name", ["SHA256", "SHA2-256", "SHA-256", "sha256", "SHA2-512", "SHA1"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_of_algorithms(http_server: HttpServer, name: str, encoding: str) -> None:
    """A .mf is accepted and compared in every spelling of its algorithm, such as OpenSSL 3's."""
    algorithm = "sha1" if name == "SHA1" else f"sha{name[-3:]}"
    text = "".join(f"{name}(./{each})= {hashlib.new(algorithm, FILES[each]).hexdigest()}\r\n" for each in FILES)
    text += "".join(f"SHA3-256({each})= {'0' * 64}\r\n" for each in FILES)
    run(http_server, ova_of(FILES | {"vm.mf": text.encode(encoding)}), MemoryStore("primary"))
    with pytest.raises(WorkerError, match=f"{algorithm}:"):
        run(http_server, ova_of(LIAR | {"vm.mf": text.encode(encoding)}), id="8")


def test_several_algorithms() -> None:
    """A file's strongest digest counts, and a file with a repeated or unknown algorithm is refused."""
    sha1, sha256 = hashlib.sha1(b"").hexdigest(), hashlib.sha256(b"").hexdigest()
    both = f"SHA2-256(a)= {sha256}\nSHA1(a)= {sha1}\n"
    assert ova.read_checksums(both.encode(), "") == {"a": Digest("sha256", sha256)}
    for more in (f"SHA256(a)= {sha256}", f"SHA3-256(b)= {sha256}", f"SHA512-256(b)= {sha256}", f"SHA256(b)= {sha1}"):
        with pytest.raises(CorruptImage, match="no known form or algorithm, or one twice"):
            ova.read_checksums(f"{both}{more}\n".encode(), "")


def test_wrong_checksum_of_the_package(http_server: HttpServer) -> None:
    """The requested checksum is that of the package."""
    with pytest.raises(ChecksumMismatch):
        run(http_server, ova_of(FILES), MemoryStore("primary"), checksum="0" * 64)


def test_asked_for_something_else(http_server: HttpServer) -> None:
    """An OVA is not accepted as a VMDK, nor a disk as an OVA."""
    with pytest.raises(UnknownFormat, match="The file is an OVA, but vmdk was asked for"):
        run(http_server, ova_of(FILES), format="vmdk")
    with pytest.raises(UnknownFormat, match="The image is raw, but ova was asked for"):
        run(http_server, mbr(), format="ova")


def test_compressed_package(http_server: HttpServer) -> None:
    """One compression is removed, but not two."""
    with pytest.raises(UnknownFormat, match="a tar file inside the gzip file"):
        run(http_server, COMPRESS["gzip"](ova_of(FILES)))


def test_owed(http_server: HttpServer) -> None:
    """A store that fails at the second disk is owed the package, and keeps no file."""
    primary, full = MemoryStore("primary"), MemoryStore("archive", capacity=len(DISK) + 1000)
    files = FILES | {"vm-disk2.vmdk": DISK}
    result = run(http_server, ova_of(files), primary, full, stores=["primary", "archive"])
    assert (result["stores"], [*full.list()]) == (["primary"], [])
    assert result["owed"]["archive"]["error"] == "StoreFull"


def test_package_is_kept(http_server: HttpServer, tmp_path: Path) -> None:
    """With keep_package the package is stored too, unchanged, and the manifest lists it."""
    store, package = FileStore("primary", tmp_path), ova_of(with_mf(FILES, last=True))
    result = run(http_server, package, store, keep_package=True)
    assert read_bytes(store, f"{PREFIX}/7.ova") == package
    assert (result["package"], result["key"]) == (f"{PREFIX}/7.ova", f"{PREFIX}/7.ovf")
    entry = read_manifest(store, Artifact("template", "2", "7")).entry("7.ova")
    assert entry is not None
    assert (entry.role, entry.size, entry.digest) == (
        "package",
        len(package),
        f"sha256:{hashlib.sha256(package).hexdigest()}",
    )


def test_package_of_a_damaged_ova(http_server: HttpServer, tmp_path: Path) -> None:
    """A package whose last file is damaged is not stored, and leaves no unfinished write."""
    store = FileStore("primary", tmp_path)
    with pytest.raises(WorkerError):
        run(http_server, ova_of(with_mf(FILES) | {"vm-disk2.vmdk": DISK}), store, keep_package=True)
    assert not [each.key for each in store.list() if each.key.endswith((".ova", "manifest.json"))]
    assert not list(store.leftovers())


def test_package_is_only_for_ovas(http_server: HttpServer) -> None:
    """keep_package changes nothing for another image."""
    store = MemoryStore("primary")
    run(http_server, mbr(), store, keep_package=True)
    names = [each.key.rpartition("/")[2] for each in store.list(PREFIX)]
    assert names == ["7.raw", "manifest.json", "template.properties"]


def test_package_of_a_full_store(http_server: HttpServer) -> None:
    """A secondary store without space for the package and its files is owed all of them."""
    package = ova_of(FILES)
    primary, full = MemoryStore("primary"), MemoryStore("archive", capacity=len(package) + 100)
    result = run(http_server, package, primary, full, stores=["primary", "archive"], keep_package=True)
    assert (result["stores"], [*full.list()]) == (["primary"], [])


@pytest.mark.parametrize("blocks", [20, 1000], ids=["small", "large"])
def test_iso(http_server: HttpServer, blocks: int) -> None:
    """An ISO image of any size keeps its extension, and is listed after the disks."""
    store, image = MemoryStore("primary"), iso(blocks)
    ovf = ovf_of("vm-disk1.vmdk", others=("tools.iso",))
    run(http_server, ova_of(with_mf({"vm.ovf": ovf, "vm-disk1.vmdk": DISK, "tools.iso": image})), store)
    assert read_bytes(store, f"{PREFIX}/7-file0.iso") == image
    manifest = read_manifest(store, Artifact("template", "2", "7"))
    assert [each.name for each in manifest.entries[:2]] == ["7.ovf", "7-disk0.vmdk"]
    assert ova.read_descriptor(read_bytes(store, f"{PREFIX}/7.ovf"), "").others == ("7-file0.iso",)


def test_large_iso_is_examined(http_server: HttpServer) -> None:
    """A large file that is called an ISO image and is none is refused."""
    ovf = ovf_of("vm-disk1.vmdk", others=("tools.iso",))
    with pytest.raises(WorkerError):
        run(http_server, ova_of({"vm.ovf": ovf, "vm-disk1.vmdk": DISK, "tools.iso": b"x" * 2_000_000}))


def test_full_primary(http_server: HttpServer) -> None:
    """A full primary store fails the download."""
    with pytest.raises(StoreFull):
        run(http_server, ova_of(FILES), MemoryStore("primary", capacity=len(DISK) + 1000))


def test_raw_in_tar(http_server: HttpServer) -> None:
    """A tar with one member that is no descriptor is unpacked as an image."""
    store = MemoryStore("primary")
    result = run(http_server, tar_of(tar_member("disk.raw", mbr())), store)
    assert (result["format"], read_bytes(store, f"{PREFIX}/7.raw")) == ("raw", mbr())


def test_unknown_format_is_still_refused() -> None:
    """The error of an unknown format lists the supported ones."""
    with pytest.raises(InvalidRequest, match="raw, ova"):
        parse_request(download.Request, {"url": "http://x", "account": 2, "id": "7", "format": "ovf"}, "download")


LAUGHS = "".join(f'<!ENTITY a{n} "{"&a" + str(n - 1) + ";" if n else "ha"}">' for n in range(3))
INCLUDE = b'<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/passwd"/>'
BAD_OVFS = {
    "an entity": (b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + OVF[39:], UnsafeImage, "document type"),
    "billions of laughs": (f"<!DOCTYPE x [{LAUGHS}]><Envelope/>".encode(), UnsafeImage, "document type"),
    "an entity in UTF-16": (OVF.decode().encode("utf-16"), CorruptImage, "cannot be read"),
    "no XML": (b"<Envelope>", CorruptImage, "cannot be read"),
    "a NUL": (OVF + b"\0", CorruptImage, "cannot be read"),
    "nothing": (b"", CorruptImage, "cannot be read"),
    "another root": (b"<Domain/>", CorruptImage, "no Envelope"),
    "a deep tree": (b"<a>" * 100_000, UnsafeImage, "nested deeper"),
    "no disk": (ovf_of(), UnknownFormat, "no disks"),
    "a path": (ovf_of("../x.vmdk"), UnsafeImage, "points outside its package: '../x.vmdk'"),
    "an absolute path": (ovf_of("/etc/passwd"), UnsafeImage, "points outside"),
    "a URL": (ovf_of("http://169.254.169.254/x"), UnsafeImage, "points outside"),
    "an escaped path": (ovf_of("..%2fx"), UnsafeImage, "points outside"),
    "an escaped absolute path": (ovf_of("%2Fetc%2Fpasswd"), UnsafeImage, "points outside"),
    "an escaped path of Windows": (ovf_of("..%5Cx"), UnsafeImage, "points outside"),
    "an escaped parent": (ovf_of("%2e%2e"), UnsafeImage, "points outside"),
    "an escaped URL": (ovf_of("http%3A%2F%2Fx"), UnsafeImage, "points outside"),
    "an escaped NUL": (ovf_of("a%00.vmdk"), UnsafeImage, "points outside"),
    "escaped twice": (ovf_of("%252e%252e%252fx"), UnsafeImage, "points outside"),
    "an escape of no UTF-8": (ovf_of("%ff.vmdk"), UnsafeImage, "points outside"),
    "an escape that is none": (ovf_of("a%zz.vmdk"), UnsafeImage, "points outside"),
    "an href twice, escaped once": (ovf_of("a b.vmdk", "a%20b.vmdk"), UnsafeImage, "names a file twice"),
    "an href twice": (ovf_of("a.vmdk", "a.vmdk"), UnsafeImage, "names a file twice"),
    "an id twice": (ovf_of("a.vmdk", inside='<File id="file0" href="b"/>'), UnsafeImage, "names a file twice"),
    "compressed files": (
        ovf_of("a.vmdk", inside='<File id="z" href="b" compression="gzip"/>'),
        UnknownFormat,
        "is compressed",
    ),
    "a file in chunks": (ovf_of("a.vmdk", inside='<File id="z" href="b" chunkSize="5"/>'), UnknownFormat, "in chunks"),
    "a disk without a file": (
        ovf_of("a.vmdk").replace(b'fileRef="file0"', b'fileRef="x"'),
        CorruptImage,
        "no file 'x'",
    ),
    "an inclusion": (ovf_of("a.vmdk").replace(b"<Info/>", INCLUDE), UnsafeImage, "includes other files"),
    "a delta disk": (ovf_of("a.vmdk").replace(b"ovf:fileRef", b'parentRef="y" ovf:fileRef'), UnsafeImage, "a delta"),
}


@pytest.mark.parametrize(("data", "error", "text"), BAD_OVFS.values(), ids=BAD_OVFS.keys())
def test_bad_descriptor(data: bytes, error: type[WorkerError], text: str) -> None:
    """A descriptor that attacks its reader or refers to other files is refused."""
    with pytest.raises(error, match=text):
        ova.read_descriptor(data, "vm.ovf")


def test_renamed() -> None:
    """Only the hrefs change, and names that need escapes are found."""
    data = ovf_of("a&amp;b.vmdk", others=("a%20%C3%A9",))
    assert ova.renamed(data, {"a&b.vmdk": "7.vmdk", "a é": "d"}, "") == ovf_of("7.vmdk", others=("d",))


def test_resized() -> None:
    """Only the sizes of the named files change, for any spelling of their names in the OVF."""
    data = ovf_of("a%20b.vmdk", "c.vmdk")
    assert ova.read_sizes(data, "") == {"a b.vmdk": 1, "c.vmdk": 1}
    assert ova.read_sizes(ova.resized(data, {"a b.vmdk": 7}, ""), "") == {"a b.vmdk": 7, "c.vmdk": 1}


def test_encoded_names(http_server: HttpServer) -> None:
    """A percent-encoded file name in the OVF, as in a URI, is found under its plain name."""
    store = MemoryStore("primary")
    files = {"vm.ovf": ovf_of("my%20disk%20%C3%A9.vmdk"), "my disk é.vmdk": DISK}
    run(http_server, ova_of(with_mf(files)), store)
    assert read_bytes(store, f"{PREFIX}/7-disk0.vmdk") == DISK
    assert ova.read_descriptor(read_bytes(store, f"{PREFIX}/7.ovf"), "").disks == ("7-disk0.vmdk",)
