"""The acceptance list of bad images and archives, row by row, through the whole job: each input and its result.

Other tests of formats, codecs and packages cover more cases. The module test_second_opinion has the results of
OpenStack's inspectors for the same bytes.
"""

from __future__ import annotations

import random
import struct
import tarfile
from pathlib import Path

import pytest

from ssvm_worker.errors import (
    AmbiguousFormat,
    ChecksumMismatch,
    CorruptImage,
    TooLarge,
    UnknownFormat,
    UnsafeImage,
    WorkerError,
)
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.memory import MemoryStore
from tests.archives import (
    COMPRESS,
    mf_of,
    ova_of,
    ovf_of,
    tar_member,
    tar_of,
    xz_with_dictionary,
    zip_of,
    zstd_with_window,
)
from tests.attempts import attempt
from tests.images import (
    gpt,
    iso,
    mbr,
    overlay,
    qcow2,
    qcow2_backed_by,
    qcow2_data_file,
    stream_optimized,
    vhd_dynamic,
    vhd_fixed,
    vhdx,
    vmdk_descriptor,
    vmdk_header,
)
from tests.neighbours import ROOT
from tests.servers.http import HttpServer

NOISE = random.Random(9).randbytes(200_000)
DISK = stream_optimized(NOISE)
Answer = type[WorkerError] | str

#: A lone descriptor that refers to a file of the host.
FLAT = vmdk_descriptor(8, createType='"monolithicFlat"', extent='RW 8 FLAT "/etc/passwd" 0')

XINCLUDE = b'<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/passwd"/>'


def described(**fields: str) -> bytes:
    return stream_optimized(NOISE, descriptor=vmdk_descriptor(len(NOISE) // 512 + 1, **fields))


def refooted() -> bytes:
    image = stream_optimized(NOISE)
    return overlay(image, {len(image) - 1024: vmdk_header(capacity=391, gd_offset=200, descriptor_offset=7)})


def packaged(**files: bytes) -> bytes:
    """Return an OVA with one disk; a dot in a name is written as two underscores."""
    members = {"vm.ovf": ovf_of("vm.vmdk"), "vm.vmdk": DISK}
    return ova_of(members | {name.replace("__", "."): data for name, data in files.items()})


def tarred(**member: object) -> bytes:
    """Return an OVA whose disk is not a plain file."""
    return tar_of(tar_member("vm.ovf", ovf_of("vm.vmdk")), tar_member("vm.vmdk", **member))  # type: ignore[arg-type]


def doctype(text: str) -> bytes:
    return packaged(vm__ovf=f"<!DOCTYPE x [{text}]>".encode() + ovf_of("vm.vmdk")[39:])


#: row, input: (bytes, the error or the accepted format, the request)
ROWS: dict[str, tuple[bytes, Answer, str]] = {
    **{f"1 backing file {name!r}": (qcow2_backed_by(name), UnsafeImage, "auto")
       for name in ("/etc/passwd", "base.qcow2", "/dev/sda", "nbd://10.0.0.1/x", 'json:{"driver":"file"}')},
    "1 backing file, version 2": (qcow2_backed_by("/etc/passwd", version=2), UnsafeImage, "qcow2"),
    "2 data file": (qcow2_data_file("/etc/passwd"), UnsafeImage, "auto"),
    "2 data file, raw": (qcow2_data_file("/etc/passwd", autoclear=2), UnsafeImage, "auto"),
    "3 unknown feature": (qcow2(incompatible=1 << 5), UnsafeImage, "auto"),
    "3 extended L2": (qcow2(incompatible=1 << 4), UnknownFormat, "auto"),
    "4 encrypted by AES": (qcow2(crypt_method=1), UnsafeImage, "auto"),
    "4 encrypted by LUKS": (qcow2(crypt_method=2), UnsafeImage, "auto"),
    "4 LUKS alone": (b"LUKS\xba\xbe\0\x02" + NOISE[:4088], UnknownFormat, "auto"),
    "4 corrupt bit": (qcow2(incompatible=2), CorruptImage, "auto"),
    "5 size of 2^62": (qcow2(size=1 << 62), CorruptImage, "auto"),
    "5 L1 of 2^31": (qcow2(l1_size=0x7FFFFFFF), CorruptImage, "auto"),
    "5 clusters of 2 GiB": (qcow2(cluster_bits=31), CorruptImage, "auto"),
    "5 refcount order": (qcow2(refcount_order=7), CorruptImage, "auto"),
    "5 snapshots": (qcow2(snapshots=65535, snapshots_offset=4096), CorruptImage, "auto"),
    "6 header alone": (qcow2()[:4096], CorruptImage, "auto"),
    "6 truncated": (qcow2(l1_entry=4 * 4096)[:-1], CorruptImage, "auto"),
    "8 descriptor": (FLAT, UnsafeImage, "auto"),
    "8 descriptor declared raw": (FLAT, UnknownFormat, "raw"),
    "8 descriptor declared iso": (FLAT, UnknownFormat, "iso"),
    "8 descriptor with NULs": (FLAT.ljust(512, b"\0"), UnsafeImage, "auto"),
    "8 descriptor with a BOM": (b"\xef\xbb\xbf" + FLAT, UnsafeImage, "auto"),
    "8 descriptor not in ASCII": (FLAT.replace(b"File", b"Fil\xe9"), UnsafeImage, "auto"),
    "8 descriptor with CRLF": (FLAT.replace(b"\n", b"\r\n"), UnsafeImage, "auto"),
    "8 path in a sparse one": (described(extent='RW 391 SPARSE "../x"'), UnsafeImage, "auto"),
    "8 createType missing": (described(createType=""), UnsafeImage, "auto"),
    "8 createType twice": (described(extra='createType="custom"'), UnsafeImage, "auto"),
    "9 parentCID": (described(parentCID="12345678"), UnsafeImage, "auto"),
    **{f"9 {kind}": (described(createType=f'"{kind}"'), UnsafeImage, "auto")
       for kind in ("twoGbMaxExtentSparse", "monolithicFlat", "vmfs", "fullDevice", "seSparse")},
    "9 COWD": (b"COWD" + NOISE[:4092], UnknownFormat, "auto"),
    "9 SE sparse": (b"\xbe\xba\xfe\xca\0\0\0\0" + NOISE[:4088], UnknownFormat, "raw"),
    "10 another footer": (refooted(), UnsafeImage, "auto"),
    "11 fixed VHD": (vhd_fixed(mbr()), "vhd", "vhd"),
    "11 differencing VHD": (vhd_dynamic(parent="C:\\base.vhd"), UnsafeImage, "auto"),
    "11 differencing VHDX": (vhdx(flags=2), UnsafeImage, "auto"),
    "12 qcow2 in raw": (qcow2(), UnknownFormat, "raw"),
    "12 vmdk in raw": (DISK, UnknownFormat, "raw"),
    "12 gzip of a qcow2 in raw": (COMPRESS["gzip"](qcow2()), UnknownFormat, "raw"),
    "13 qcow2 and ISO": (overlay(iso(), {0: qcow2()}), AmbiguousFormat, "auto"),
    "13 qcow2 and ISO, as ISO": (overlay(iso(), {0: qcow2()}), AmbiguousFormat, "iso"),
    "13 qcow2 and GPT": (overlay(gpt(), {0: b"QFI\xfb\0\0\0\3"}), AmbiguousFormat, "auto"),
    "13 isohybrid": (iso(system_area=mbr(32 << 10)), "iso", "auto"),
    "13 a boot flag of no kind": (overlay(mbr(), {446: b"\x01"}), "raw", "auto"),
    "14 one byte": (b"\xff", UnknownFormat, "auto"),
    "14 511 bytes": (b"\xff" * 511, UnknownFormat, "raw"),
    "14 HTML": (b"<!DOCTYPE html><html><title>404</title></html>", UnknownFormat, "qcow2"),
    **{f"16 {kind} bomb": (wrap(bytes(10 << 20)), TooLarge, "auto") for kind, wrap in COMPRESS.items()},
    "16 zip bomb": (zip_of(bytes(10 << 20)), TooLarge, "auto"),
    "17 xz of 4 GiB": (xz_with_dictionary(1 << 32), TooLarge, "auto"),
    "17 zstandard of 2 GiB": (zstd_with_window(31), TooLarge, "auto"),
    **{f"18 {kind}, truncated": (wrap(mbr())[:-2], CorruptImage, "auto") for kind, wrap in COMPRESS.items()},
    **{f"18 {kind}, junk": (wrap(mbr()) + b"junk", CorruptImage, "auto") for kind, wrap in COMPRESS.items()},
    **{f"18 {kind}, zeros": (wrap(mbr()) + bytes(64), "raw", "auto") for kind, wrap in COMPRESS.items()},
    **{f"18 {kind}, two members": (wrap(mbr()) + wrap(bytes(512)), "raw", "auto") for kind, wrap in COMPRESS.items()},
    "18 wrong CRC": (COMPRESS["gzip"](mbr())[:-8] + b"\0" * 4 + struct.pack("<I", 1 << 20), CorruptImage, "auto"),
    "19 gzip in gzip": (COMPRESS["gzip"](COMPRESS["gzip"](mbr())), UnknownFormat, "auto"),
    "19 OVA in gzip": (COMPRESS["gzip"](packaged()), UnknownFormat, "auto"),
    "20 zip of two": (zip_of(b"a", more=zip_of(b"b")), UnknownFormat, "auto"),
    "20 zip, encrypted": (zip_of(NOISE, local={"flags": 1}), UnsafeImage, "auto"),
    "20 zip, overlapping": (zip_of(NOISE, entry={"offset": 9}), UnsafeImage, "auto"),
    "20 zip, size lies": (zip_of(NOISE, local={"size": 9}), CorruptImage, "auto"),
    "20 zip, zip64 lies": (zip_of(NOISE, local={"size": 0xFFFFFFFF}), CorruptImage, "auto"),
    "20 zip, descriptor lies": (
        zip_of(NOISE, streamed=True).replace(b"PK\x07\x08", b"PK\x07\x08\1"), CorruptImage, "auto"),
    "20 zip, ..": (zip_of(NOISE, b"../x"), UnsafeImage, "auto"),
    "20 zip, absolute": (zip_of(NOISE, b"/etc/passwd"), UnsafeImage, "auto"),
    "21 OVA": (packaged(), "ova", "auto"),
    "21 symbolic link": (tarred(kind=tarfile.SYMTYPE, linkname="/etc/passwd"), UnsafeImage, "auto"),
    "21 hard link": (tarred(kind=tarfile.LNKTYPE, linkname="vm.ovf"), UnsafeImage, "auto"),
    "21 device": (tarred(kind=tarfile.CHRTYPE), UnsafeImage, "auto"),
    "21 fifo": (tarred(kind=tarfile.FIFOTYPE), UnsafeImage, "auto"),
    "21 sparse member": (tarred(pax_headers={"GNU.sparse.size": "8796093022208"}), UnsafeImage, "auto"),
    "21 pax bomb": (tarred(pax_headers={"comment": "x" * 100_000}), UnsafeImage, "auto"),
    "21 size below zero": (tarred(pax_headers={"size": "-5"}), CorruptImage, "auto"),
    "21 an absolute path": (tar_of(tar_member("vm.ovf", ovf_of("vm.vmdk")), tar_member("/x")), UnsafeImage, "auto"),
    "21 a name twice": (tar_of(*[tar_member("vm.ovf", ovf_of("vm.vmdk"))] * 2), UnsafeImage, "auto"),
    "21 a path": (tar_of(tar_member("vm.ovf", ovf_of("vm.vmdk")), tar_member("../x")), UnsafeImage, "auto"),
    "21 OVF not first": (ova_of({"vm.vmdk": DISK, "vm.ovf": ovf_of("vm.vmdk")}), UnknownFormat, "auto"),
    "21 no OVF": (ova_of({"a.vmdk": DISK, "b.vmdk": DISK}), UnknownFormat, "auto"),
    "21 two OVFs": (packaged(x__ovf=ovf_of("vm.vmdk")), UnsafeImage, "auto"),
    "21 href missing": (ova_of({"vm.ovf": ovf_of("vm.vmdk")}), CorruptImage, "auto"),
    "21 href ..": (ova_of({"vm.ovf": ovf_of("../x")}), UnsafeImage, "auto"),
    "21 href URL": (ova_of({"vm.ovf": ovf_of("http://169.254.169.254/")}), UnsafeImage, "auto"),
    "21 many members": (packaged(**{f"x{n}__cert": b"" for n in range(300)}), UnsafeImage, "auto"),
    "21 .mf": (packaged(vm__mf=mf_of({"vm.vmdk": b"else", "vm.ovf": ovf_of("vm.vmdk")})), CorruptImage, "auto"),
    "21 .mf first": (
        ova_of({"vm.ovf": ovf_of("vm.vmdk"), "vm.mf": mf_of({"vm.vmdk": b"else"}), "vm.vmdk": DISK}),
        ChecksumMismatch,
        "auto",
    ),
    "22 inclusion": (
        ova_of({"vm.ovf": ovf_of("vm.vmdk").replace(b"<Info/>", XINCLUDE), "vm.vmdk": DISK}), UnsafeImage, "auto"),
    "22 XXE": (doctype('<!ENTITY a SYSTEM "file:///etc/passwd">'), UnsafeImage, "auto"),
    "22 billion laughs": (doctype('<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">'), UnsafeImage, "auto"),
    "22 quadratic": (doctype(f'<!ENTITY a "{"x" * 50_000}">'), UnsafeImage, "auto"),
    "22 100 MB": (packaged(vm__ovf=bytes(5 << 20)), TooLarge, "auto"),
    "22 deep": (packaged(vm__ovf=b"<a>" * 100_000), UnsafeImage, "auto"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "answer", "asked"), ROWS.values(), ids=ROWS.keys())
def test_row(http_server: HttpServer, data: bytes, answer: Answer, asked: str) -> None:
    """Every row of the list gives its result, and a refused input leaves nothing."""
    store = MemoryStore("primary")
    fields = {"url": http_server.serve("image", data), "account": 2, "id": "7", "format": asked}
    request = parse_request(download.Request, fields, "download")
    trying = attempt(store, settings={"download": {"max_bytes": 8 << 20}})
    if isinstance(answer, str):
        assert download.run(request, trying)["format"] == answer
        return
    with pytest.raises(WorkerError) as caught:
        download.run(request, trying)
    assert (type(caught.value), caught.value.exit_code) == (answer, 1)
    download.discard(request, trying)
    assert ([*store.list()], store.sweep(0)) == ([], 0)


#: The rows that are not bytes of an image, and their tests. 37: accounts share nothing.
ELSEWHERE: dict[int, tuple[str, ...]] = {
    7: ("test_convert.py::test_expansion_bomb", "test_convert.py::test_limits"),
    15: ("test_convert.py::test_output_is_judged",),
    23: ("test_refused_downloads.py::test_address", "test_sockets.py::test_spellings_of_loopback"),
    24: ("test_sockets.py::test_only_the_allowed_of_several", "test_sockets.py::test_connected_peer_is_judged"),
    25: (
        "test_http_access.py::test_redirect_refused",
        "test_http_access.py::test_redirect_from_https_to_http",
        "test_http_access.py::test_too_many_redirects",
        "test_http_access.py::test_credentials_stay_with_their_origin",
    ),
    26: ("test_refused_downloads.py::test_scheme",),
    27: ("test_refused_downloads.py::test_body", "test_http_source.py::test_short"),
    28: ("test_http_source.py::test_stall",),
    29: ("test_http_source.py::test_changed", "test_http_source.py::test_range_ignored"),
    30: ("test_refused_downloads.py::test_content_encoding", "test_refused_downloads.py::test_encoded_on_the_way"),
    31: (
        "test_refused_downloads.py::test_checksum",
        "test_refused_downloads.py::test_weak_checksum",
        "test_download_job.py::test_wrong_checksum_leaves_nothing",
    ),
    32: ("test_refused_downloads.py::test_names",),
    33: ("test_http_access.py::test_untrusted_certificate", "test_http_access.py::test_bad_certificate"),
    34: ("test_http_source.py::test_proxy_variables",),
    35: ("contracts/quota.py::test_race", "test_file_store.py::test_full_on_the_way"),
    36: ("test_hung_store.py::test_process_is_freed", "test_nfs_health.py::test_hung_server"),
    37: ("test_refused_downloads.py::test_nobody_gets_what_another_has_fetched",),
    38: (
        "test_serve.py::test_expired",
        "test_serve.py::test_badly_signed",
        "test_serve.py::test_range",
        "test_serve.py::test_head",
    ),
    39: ("test_file_store.py::test_link_to_a_directory_is_refused", "test_file_store.py::test_silly_renames"),
    40: (
        "e2e/test_recovery.py::test_killed",
        "e2e/test_killed_transfers.py::test_upload",
        "e2e/test_recovery.py::test_worker_killer",
    ),
}


def test_no_row_is_missing() -> None:
    """Each of the 40 rows is in this file or in a named test."""
    assert {int(row.split()[0]) for row in ROWS} | set(ELSEWHERE) == set(range(1, 41))
    for name in (each for names in ELSEWHERE.values() for each in names):
        file, _, test = name.partition("::")
        texts = [path.read_text() for path in (ROOT / "tests").rglob(Path(file).name)]
        assert any(f"def {test}(" in text for text in texts), name
