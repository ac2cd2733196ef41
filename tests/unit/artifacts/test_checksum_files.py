"""Checksum files in the forms of publishers, tools and operating systems are read, and ambiguous files are refused."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.artifacts.checksum_files import decode_text, find_in_sums
from ssvm_worker.artifacts.checksums import HEX_LENGTHS, Digest
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import read_bytes
from tests import images
from tests.attempts import attempt
from tests.servers.http import HttpServer

HEX = {name: hashlib.new(name, b"abc").hexdigest() for name in (*HEX_LENGTHS, "blake2b", "blake2s", "sha3_256")}
ABC, MD5, SHA512 = HEX["sha256"], HEX["md5"], HEX["sha512"]
OTHER = hashlib.sha256(b"other").hexdigest()
FILES = (("other.img", OTHER), ("image.img", ABC))
LIST = "\r\nAlgorithm : SHA256\r\nHash      : {hash}\r\nPath      : C:\\images\\{name}\r\n\r\n"
TABLE = (
    "\r\nAlgorithm       Hash{blank}Path\r\n---------       ----{blank}----\r\n"
    "SHA256          {hash}       {path}\r\n\r\n"
)
CERTUTIL = "SHA256 hash of {name}:\r\n{hash}\r\nCertUtil: -hashfile command completed successfully.\r\n"


def table(path: str) -> str:
    return TABLE.format(hash=ABC.upper(), path=path, blank=" " * 67)


OBJECTS = [
    {"Algorithm": "SHA256", "Hash": OTHER, "Path": "C:\\x\\other.img"},
    {"Algorithm": "SHA256", "Hash": ABC, "Path": "C:\\x\\image.img"},
]
SUMS = [
    pytest.param(f"{ABC}  image.img\n", id="GNU, text"),
    pytest.param(f"{ABC} *image.img\n", id="GNU, binary"),
    pytest.param(f"{ABC.upper()}\timage.img", id="upper case, a tab, no line end"),
    pytest.param(f"{ABC}  ./dir/image.img\r\n", id="with a path and CRLF"),
    pytest.param(f"{OTHER}  other.img\r{ABC}  image.img\r", id="CR alone"),
    pytest.param(f"{OTHER}  other.img\0{ABC}  image.img\0", id="GNU --zero"),
    pytest.param(f"\\{OTHER}  a\\nb.img\n{ABC}  image.img\n", id="beside an escaped name"),
    pytest.param(f"SHA256 (image.img) = {ABC}\n", id="BSD"),
    pytest.param(f"SHA256 (image.img) = {base64.b64encode(bytes.fromhex(ABC)).decode()}\n", id="cksum --base64"),
    pytest.param(f"SHA256(image.img)= {ABC}\n", id="OpenSSL 1"),
    pytest.param(f"SHA2-256(image.img)= {ABC}\n", id="OpenSSL 3"),
    pytest.param(f"# image.img: 3 bytes\nSHA256 (image.img) = {ABC}\n", id="Fedora, with a comment"),
    pytest.param(f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n{ABC} *image.img\n", id="clear-signed"),
    pytest.param(
        f"-----BEGIN PGP SIGNED MESSAGE-----\r\nHash: SHA512\r\n\r\n- {ABC}  image.img\r\n"
        f"-----BEGIN PGP SIGNATURE-----\r\n\r\n{'a' * 64}\r\n-----END PGP SIGNATURE-----\r\n",
        id="clear-signed, dash-escaped",
    ),
    pytest.param(f"{'0' * 64}  image.img.sig\n{'1' * 64}  my-image.img\n{ABC}  image.img\n", id="among similar names"),
    pytest.param(f"{ABC}\n", id="a bare digest"),
    pytest.param(f"{ABC}  -\n", id="of standard input"),
    pytest.param(f"SHA2-256(stdin)= {ABC}\n", id="of standard input, OpenSSL"),
    pytest.param(f"# built on Monday\n\n{ABC}\n", id="a bare digest below a comment"),
    pytest.param(f"image.img: {ABC}\n", id="the name first"),
    pytest.param(f"image.img {ABC}\nother.img {OTHER}\n", id="the name first, without a colon"),
    pytest.param(f"image.img: sha256:{ABC}\n", id="the name first, with the algorithm"),
    pytest.param(f"sha256:{ABC}  image.img\n", id="the algorithm with the digest"),
    pytest.param(f"MD5: {MD5}\nSHA256: {ABC}\n", id="algorithms, without a name"),
    pytest.param(f"File: image.img\nSHA256: {ABC}\n\nFile: other.img\nSHA256: {OTHER}\n", id="stanzas"),
    pytest.param(f"MD5Sum:\n {MD5} 3 image.img\nSHA256:\n {ABC} 3 image.img\n", id="Debian's sections, with sizes"),
    pytest.param(f"SHA256    Size  Name\n------ ------  ----\n{ABC}   3  image.img\n", id="7-Zip"),
    pytest.param(f"%%%% HASHDEEP-1.0\n%%%% size,md5,sha256,filename\n3,{MD5},{ABC},/x/image.img\n", id="hashdeep"),
    pytest.param(f"{ABC}  My%20Images/image%2Eimg\n", id="encoded as in a URL"),
    pytest.param(f"{ABC}  C:\\My Images\\image.img\n", id="backslashes"),
    pytest.param(LIST.format(name="other.img", hash=OTHER) + LIST.format(name="image.img", hash=ABC), id="Format-List"),
    pytest.param(table("C:\\images\\image.img"), id="Format-Table"),
    pytest.param(table("C:\\images\\im..."), id="Format-Table, cut"),
    pytest.param(f'"Algorithm","Hash","Path"\r\n"SHA256","{ABC}","C:\\images\\image.img"\r\n', id="Export-Csv"),
    pytest.param(json.dumps({"Algorithm": "SHA256", "Hash": ABC, "Path": "C:\\x\\image.img"}), id="ConvertTo-Json"),
    pytest.param(json.dumps(OBJECTS, indent=4), id="ConvertTo-Json, two"),
    pytest.param(CERTUTIL.format(name="image.img", hash=ABC), id="certutil"),
    pytest.param(
        CERTUTIL.format(name="file other.img", hash=bytes.fromhex(OTHER).hex(" "))
        + CERTUTIL.format(name="file C:\\images\\image.img", hash=bytes.fromhex(ABC).hex(" ")),
        id="certutil before Windows 10",
    ),
    pytest.param(f"SHA256-Hash von image.img:\r\n{ABC}\r\nCertUtil: -hashfile-Befehl\r\n", id="certutil, German"),
]


@pytest.mark.parametrize("sums", SUMS)
def test_forms(sums: str) -> None:
    """The digest of the requested file is found in each form."""
    assert find_in_sums(sums, "/dir/image.img", "https://example.org/dir/CHECKSUM") == Digest("sha256", ABC)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["image.img", "Prüfstand.img"])
def test_encodings(encoding: str, name: str) -> None:
    """A file in any common encoding is read, and so is a file name that is not ASCII."""
    sums = f"{OTHER}  other.img\r\n{ABC}  {name}\r\n".encode(encoding)
    assert find_in_sums(decode_text(sums), f"/{name}", "SHA256SUMS") == Digest("sha256", ABC)


def test_decomposed() -> None:
    """A name with decomposed accents, as macOS writes it, equals the composed name."""
    assert find_in_sums(f"{ABC}  Pru\u0308fstand.img", "/Prüfstand.img", "SHA256SUMS").hex == ABC


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        *(pytest.param("sha256sum", [each], id=each or "plain") for each in ("", "--tag", "--zero", "--binary")),
        pytest.param("openssl", ["dgst", "-sha256"], id="openssl dgst"),
        pytest.param("openssl", ["dgst", "-sha256", "-r"], id="openssl dgst -r"),
        pytest.param("shasum", ["-a", "256"], id="shasum"),
        pytest.param("cksum", ["-a", "sha256"], id="cksum"),
        pytest.param("cksum", ["-a", "sha256", "--untagged"], id="cksum --untagged"),
        pytest.param("gpg", ["--print-md", "sha256"], id="gpg --print-md"),
    ],
)
@pytest.mark.parametrize("name", ["image.img", "an image (1) = x.img", f"{'long' * 24}.img"])
def test_tools(tmp_path: Path, tool: str, arguments: list[str], name: str) -> None:
    """The checksum files that the installed tools write are read."""
    tmp_path.joinpath(name).write_bytes(b"abc")
    command = [shutil.which(tool) or tool, *filter(None, arguments), name]
    written = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    assert find_in_sums(decode_text(written), f"/{name}", "CHECKSUM") == Digest("sha256", ABC)


def groups(digits: str, size: int) -> str:
    """Return a digest as gpg prints it."""
    return " ".join(digits.upper()[at : at + size] for at in range(0, len(digits), size))


@pytest.mark.parametrize("name", ["image.img", "other.img"])
def test_gpg(name: str) -> None:
    """Digests in groups, as gpg prints them over several lines, belong to the file and algorithm before them."""
    plain = "".join(f"{n}: {groups(d[:56], 8)}\n           {d[56:].upper()}\n" for n, d in FILES)
    named = "".join(f"{n}:    MD5 = {groups(MD5, 2)}\n{n}: RMD160 = {groups('0' * 40, 4)}\n"
                    f"{n}: SHA256 = {groups(d[:48], 8)}\n     {groups(d[48:], 8)}\n" for n, d in FILES)  # fmt: skip
    for sums in (plain, named):
        assert find_in_sums(sums, f"/{name}", "SUMS") == Digest("sha256", dict(FILES)[name])
    assert find_in_sums(groups(ABC, 8), "/image.img", "SUMS") == Digest("sha256", ABC)


def test_escaped_name() -> None:
    """A backslash before a line marks its file name as escaped."""
    assert find_in_sums(f"\\{ABC}  a\\nb.img\n", "/a\nb.img", "SHA256SUMS").hex == ABC
    assert find_in_sums(f"\\SHA256 (a\\nb.img) = {ABC}\n", "/a\nb.img", "SHA256SUMS").hex == ABC


# Which of several lines counts


DEBIAN = f"{OTHER}  ./netboot/gtk/mini.iso\n{ABC}  ./netboot/mini.iso\n{OTHER}  ./netboot/xen/mini.iso\n"


@pytest.mark.parametrize("sums", [DEBIAN, "".join(reversed(DEBIAN.splitlines(keepends=True)))])
def test_directories(sums: str) -> None:
    """If several entries have one file name, the entry with the path below the checksum file counts."""
    url = "https://example.org/images/SHA256SUMS"
    assert find_in_sums(sums, "/images/netboot/mini.iso", url).hex == ABC
    assert find_in_sums(sums.replace("./", "images/"), "/images/netboot/mini.iso", "https://other.example/S").hex == ABC
    assert find_in_sums(sums.replace("/", "\\"), "/images/netboot/mini.iso", url).hex == ABC


def test_parent_directory() -> None:
    """An entry's path may leave the directory of the checksum file."""
    sums = f"{OTHER}  mini.iso\n{ABC}  ../netboot/mini.iso\n"
    assert find_in_sums(sums, "/images/netboot/mini.iso", "https://example.org/images/sums/SHA256SUMS").hex == ABC


def test_plain_name_before_other_directories() -> None:
    """A name without directories is a better match than a name with other directories."""
    sums = f"{OTHER}  gtk/mini.iso\n{ABC}  mini.iso\n"
    assert find_in_sums(sums, "/mirror/netboot/mini.iso", "https://example.org/SHA256SUMS").hex == ABC


def test_unclear() -> None:
    """Two equally good digests are refused, and the error shows both lines."""
    sums = f"{OTHER}  a/mini.iso\n{ABC}  b/mini.iso\n"
    with pytest.raises(InvalidRequest, match=r"two digests.*line 1 .*a/mini\.iso.*line 2 .*b/mini\.iso"):
        find_in_sums(sums, "/c/mini.iso", "https://example.org/SHA256SUMS")
    assert find_in_sums(sums.replace(OTHER, ABC), "/c/mini.iso", "https://example.org/SHA256SUMS").hex == ABC


BLAKE2B, SHA3, BSD = HEX["blake2b"], HEX["sha3_256"], f"SHA512 (image.img) = {SHA512}\n"
SEVERAL = [
    pytest.param(f"# BLAKE2B HASH\n{BLAKE2B}  image.img\n# SHA512 HASH\n{SHA512}  image.img\n", "DIGESTS", id="Gentoo"),
    pytest.param(f"DIST image.img 3 BLAKE2B {BLAKE2B} SHA512 {SHA512}\n", "Manifest", id="Gentoo's manifest"),
    pytest.param(f"BLAKE2b (image.img) = {BLAKE2B}\n{BSD}", "CHECKSUM", id="BSD"),
    pytest.param(f"SHA3-256 (image.img) = {SHA3}\n{BSD}", "CHECKSUM", id="SHA-3"),
    pytest.param(f"MD5 (image.img) = {MD5}\nSHA256 (image.img) = {ABC}\n{BSD}", "CHECKSUM", id="the strongest last"),
    pytest.param(f"{MD5}  image.img\n{ABC}  image.img\n{SHA512}  image.img\n", "CHECKSUM", id="by length"),
    pytest.param(f"{SHA512}  image.img\n", "https://example.org/x/SHA512SUMS", id="by the file's name"),
]


@pytest.mark.parametrize(("sums", "where"), SEVERAL)
def test_algorithms(sums: str, where: str) -> None:
    """The strongest supported algorithm of several counts, in any order."""
    assert find_in_sums(sums, "image.img", where) == Digest("sha512", SHA512)


def test_taken() -> None:
    """A line with a disallowed kind of checksum is skipped, and is refused if no other line exists."""
    sums = f"MD5 (image.img) = {MD5}\nSHA512 (image.img) = {SHA512}\nSHA256 (image.img) = {ABC}\n"
    assert find_in_sums(sums, "image.img", "CHECKSUM", ["sha256"]) == Digest("sha256", ABC)
    with pytest.raises(InvalidRequest, match="does not allow md5, sha512, sha256 checksums"):
        find_in_sums(sums, "image.img", "CHECKSUM", ["sha1"])


@pytest.mark.parametrize(
    ("sums", "where", "named"),
    [
        pytest.param(f"BLAKE2b (image.img) = {HEX['blake2b']}", "CHECKSUM", "blake2b", id="BSD"),
        pytest.param(f"{HEX['blake2b']}  image.img", "b2sums.txt", "b2", id="the file's name"),
        pytest.param(f"# BLAKE2S HASH\n{HEX['blake2s']}  image.img", "DIGESTS", "blake2s", id="a section"),
        pytest.param(f"{HEX['sha3_256']}  image.img", "image.img.sha3-256", "sha3-256", id="SHA-3 by its ending"),
        pytest.param(f"SHA512-256(image.img)= {ABC}", "CHECKSUM", "sha512-256", id="SHA-512/256"),
    ],
)
def test_unknown_algorithm(sums: str, where: str, named: str) -> None:
    """A digest by an unsupported algorithm is named, and is not used as another algorithm of its length."""
    with pytest.raises(InvalidRequest, match=f"only {named} for"):
        find_in_sums(sums, "image.img", where)


@pytest.mark.parametrize(
    "sums",
    [
        "",
        "<html>404</html>",
        "<!DOCTYPE html><title>image.img</title>",
        f"{ABC}  other.img",
        f"{ABC}  image.img.sig",
        f"{ABC}\n{OTHER}  other.img\n",
        CERTUTIL.format(name="other.img", hash=ABC),
        LIST.format(name="other.img", hash=ABC),
    ],
)
def test_not_in_sums_file(sums: str) -> None:
    """A checksum file that does not name the image is an error."""
    with pytest.raises(InvalidRequest, match=r"image\.img"):
        find_in_sums(sums, "/image.img", "SHA256SUMS")


def test_web_page() -> None:
    """If the checksum file is a web page, the error says so."""
    with pytest.raises(InvalidRequest, match="a web page"):
        find_in_sums(f"<!doctype html><pre>{ABC}  image.img</pre>", "/image.img", "SHA256SUMS")


@pytest.mark.parametrize("piece", [" ", "\\", "(", "a ", "0", "/", "\t:", '"', ",", "sha256 "])
def test_long_line(piece: str) -> None:
    """A long line of any content is read in linear time."""
    with pytest.raises(InvalidRequest):
        find_in_sums((piece * 8000)[:8000] + "\n", "/image.img", "SHA256SUMS")


@given(st.text(st.sampled_from(f'{ABC[:3]}0123456789abcdef ()=:*\\/.,"\r\n-#SHA256'), max_size=300))
def test_any_text(text: str) -> None:
    """Any text gives a digest or an error of the request, never a crash."""
    for name in ("image.img", ""):
        with contextlib.suppress(InvalidRequest):
            assert find_in_sums(text, name, "SHA256SUMS").algorithm in HEX_LENGTHS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_job(http_server: HttpServer, encoding: str) -> None:
    """A download finds its line in such a file by path and allowed algorithms, in any encoding."""
    data, store = images.mbr(1 << 20), MemoryStore("primary")
    good = hashlib.sha256(data).hexdigest()
    sums = f"{MD5}  ./netboot/mini.iso\r\n{OTHER}  ./netboot/gtk/mini.iso\r\n{good}  ./netboot/mini.iso\r\n"
    asked = {
        "url": http_server.serve("images/netboot/mini.iso", data),
        "checksum": http_server.serve("images/SHA256SUMS", sums.encode(encoding)),
        "account": 2,
        "id": "7",
    }
    settings = {"download": {"allow_networks": ["127.0.0.0/8"], "checksums": ["sha256"]}}
    download.run(parse_request(download.Request, asked, "download"), attempt(store, settings=settings))
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == data
