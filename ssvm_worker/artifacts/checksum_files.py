"""Checksum files as publishers, tools and operating systems write them, and the one digest in them of a certain file.

HEX  name   HEX *name                 coreutils, shasum; under "# SHA512 HASH" in Gentoo's, "SHA256:" in Debian's
SHA256 (name) = HEX                   BSD, coreutils --tag; OpenSSL 1 "SHA256(name)= ", OpenSSL 3 "SHA2-256(name)= "
name: HEX   name HEX                  many web pages
Algorithm : SHA256 / Hash / Path      PowerShell's Get-FileHash, as a list, a table, CSV or JSON
SHA256 hash of name: / HEX            certutil; before Windows 10 with a blank between the bytes
HEX                                   of the one file that the reader asks for
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ssvm_worker.errors import InvalidRequest

from .checksums import HEX_LENGTHS, Digest, algorithm_of, hex_of

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: Characters of a line that are read; a path has 4096 at most.
_MOST_LINE = 8192
_SIGNED = "-----BEGIN PGP SIGNED MESSAGE-----"
_SIGNATURE = "-----BEGIN PGP SIGNATURE-----"
#: Names of algorithms in a text. Those that we cannot compute are known too: their digests are of no other algorithm.
_WORD = re.compile(
    r"(?<![a-z0-9])(md[245]|sha-?3-?\d{3}|sha-?2?-?(?:224|256|384|512)(?:[-/_t]?(?:224|256)(?!\d))?|sha-?1|blake-?2[bs]p?"
    r"(?:-\d{3})?|blake-?3|b2|b3|rmd-?160|ripemd-?160|whirlpool|sm3|crc-?32c?|shake-?\d{3}|tiger|streebog-?\d{3})"
    r"(?:sums?)?(?![a-z0-9])",
    re.IGNORECASE,
)
_DIGEST = r"([0-9a-fA-F]{32,})(?![0-9A-Za-z])"
_FIRST = re.compile(rf"\s*(\\?){_DIGEST}(?!,)(.*)")
_PREFIXED = re.compile(rf"""\s*[\["'{{]?([A-Za-z][\w/.-]{{1,31}})[\]"'}}]?[\s:=]+["']?{_DIGEST}["']?,?(.*)""")
_LAST = re.compile(rf"""(?<![0-9A-Za-z])["']?{_DIGEST}["']?,?\s*$""")
_TAG_VALUE = re.compile(r"\s*=\s*([0-9A-Za-z+/]{22,128}={0,2})\s*")
#: Gentoo's Manifest: ``DIST name size BLAKE2B HEX SHA512 HEX``.
_MANIFEST = re.compile(r"[A-Z]+ (\S+) \d+((?: \w+ [0-9a-f]{32,})+)\s*")
_BYTES = re.compile(r"\s*(?:[0-9a-fA-F]{2} ){15,}[0-9a-fA-F]{2}\s*")
_KEY = re.compile(r"""\s*["']?(algorithm|hash|path|file ?name|file|name)["']?\s{0,16}[:=]\s*["']?(.*)""", re.IGNORECASE)
#: 64 hex digits may be of these too, 128 of any other algorithm that does not tell its bits.
_HAVE_64 = ("blake2s", "blake3", "b3", "sm3", "tiger")


@dataclass
class _Entry:
    """One digest, and what the checksum file says that it is of."""

    number: int
    line: str
    algorithm: str
    hex: str
    #: Empty if no file is named.
    name: str = ""
    #: The line above, which may name the file at its end, in the words of any language.
    heading: str = ""


def decode_text(data: bytes) -> str:
    """Decode a small text: UTF-8, UTF-16 and UTF-32 by their byte order mark, UTF-16 without one, else Windows-1252."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    if len(data) > 3 and not (any(data[1:40:2]) and any(data[0:40:2])):
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def find_in_sums(sums: str, path: str, where: str, taken: Sequence[str] = tuple(HEX_LENGTHS)) -> Digest:
    """Return the digest of the file at *path* (of its URL), by the strongest algorithm among those *taken*.

    *where* is the URL of the checksum file: names in it are relative to that, and its own name may tell the algorithm.
    A name with other directories counts where no better one is there. Raises InvalidRequest if nothing, nothing that
    is taken, or two different digests are found.
    """
    file_name = path.rpartition("/")[2]
    if "<html" in sums[:4096].lower() or sums.lstrip()[:9].lower() == "<!doctype":
        what = f"The checksum file is a web page, so it names no {file_name!r}"
        raise InvalidRequest(what, where, "Give the URL of the checksum file itself")
    found = _best(_Reader(where).read(sums), path, where)
    if not found:
        what = f"The checksum file names no {file_name!r}"
        raise InvalidRequest(what, where, "Give the digest itself, or the sums file of this image")
    known = [each for each in found if each.algorithm in HEX_LENGTHS]
    if not known:
        names = ", ".join(dict.fromkeys(each.algorithm[:40] for each in found))
        what = f"The checksum file has only {names} for {file_name!r}"
        raise InvalidRequest(what, where, f"Give a digest by one of {', '.join(taken)}")
    usable = [each for each in known if each.algorithm in taken]
    if not usable:
        names = ", ".join(dict.fromkeys(each.algorithm for each in known))
        raise InvalidRequest(f"The settings take no {names} checksums", "checksum", f"Give one of {', '.join(taken)}")
    strongest = max(usable, key=lambda each: HEX_LENGTHS[each.algorithm])
    for other in usable:
        if other.algorithm == strongest.algorithm and other.hex != strongest.hex:
            what = f"The checksum file has two digests for {file_name!r}: {_shown(strongest)} and {_shown(other)}"
            raise InvalidRequest(what, where, "Give the digest itself")
    return Digest(strongest.algorithm, strongest.hex)


def _shown(entry: _Entry) -> str:
    return f"line {entry.number} ({entry.line.strip()[:200]!a})"


def _best(entries: list[_Entry], path: str, where: str) -> list[_Entry]:
    """The entries that name the file best; those without any name if no entry has one."""
    wanted = _parts(path)
    home = _parts(unquote(urlsplit(where).path).rpartition("/")[0])
    ranks = [_rank(each, wanted, home) for each in entries]
    best = max(ranks, default=_NOT_NAMED)
    if best > _NOT_NAMED:
        return [each for each, rank in zip(entries, ranks, strict=True) if rank == best]
    return entries if not any(each.name or _names_a_file(each.heading) for each in entries) else []


#: How well a name fits: exactly, wholly, or in some of its last parts; then, in how many of them.
_Rank = tuple[int, int]
_NOT_NAMED: _Rank = (0, 0)


def _rank(entry: _Entry, wanted: list[str], home: list[str]) -> _Rank:
    if entry.heading and wanted and re.search(rf"(?:^|[\s/\\\"'(]){re.escape(wanted[-1])}$", entry.heading):
        return 1, 1
    spellings = {entry.name, unquote(entry.name), re.sub(r"^\d+\s+", "", entry.name)}  # 7-Zip and Debian: size, name
    return max(_fit(_parts(each), wanted, home) for each in spellings)


def _fit(parts: list[str], wanted: list[str], home: list[str]) -> _Rank:
    same = 0
    while same < min(len(parts), len(wanted)) and parts[-1 - same] == wanted[-1 - same]:
        same += 1
    if not same:
        return _NOT_NAMED
    return 3 if home + parts == wanted else 2 if same == len(parts) else 1, same


def _parts(path: str) -> list[str]:
    """The names on a path, with the separators of any system, and Unicode composed: macOS writes it decomposed."""
    names: list[str] = []
    for each in re.split(r"[/\\]+", unicodedata.normalize("NFC", path)):
        if each == "..":
            names = names[:-1]
        elif each not in ("", ".") and not re.fullmatch("[A-Za-z]:", each):
            names.append(each)
    return names


def _names_a_file(heading: str) -> bool:
    return bool(set(heading.rpartition(" ")[2]) & set("./\\"))


@dataclass
class _Reader:
    """Reads a checksum file line by line; what stands above a digest tells more about it."""

    #: The URL of the file.
    where: str
    found: list[_Entry] = field(default_factory=list)
    #: The algorithm that the last heading names, and the heading if it may name a file as well.
    section: str = ""
    heading: str = ""
    #: Of the present stanza, which a blank line ends: its first entry, and what its keys say.
    first: int = 0
    keys: dict[str, str] = field(default_factory=dict)

    def read(self, text: str) -> list[_Entry]:
        """Return the digests in their order."""
        for number, line in enumerate(_lines(text)):  # the first is empty
            if not line.strip():
                self._end_stanza()
            elif len(line) <= _MOST_LINE:
                self._read_line(number, line)
        self._end_stanza()
        return self.found

    def _read_line(self, number: int, line: str) -> None:
        if _BYTES.fullmatch(line):
            line = line.replace(" ", "")
        if self._read_key(number, line):
            return
        for form in (_tagged, _of_manifest, _digest_first, _fields, _prefixed, _digest_last):
            if found := form(line):
                for word, value, name in found:
                    self._add(number, line, word, value, name)
                return
        words = dict.fromkeys(match[1].lower() for match in _WORD.finditer(line))
        if len(words) == 1:
            self.section = next(iter(words))
            is_title = line.rstrip().endswith(":") and not line.startswith("#")
            self.heading = line.rstrip(":)\"' \t") if is_title else ""

    def _read_key(self, number: int, line: str) -> bool:
        """Take a line of PowerShell's list, or of a stanza that names its file in a line of its own."""
        match = _KEY.fullmatch(line)
        if not match:
            return False
        key, value = match[1].lower(), match[2].rstrip(" ,\"'\t")
        if key == "hash" and re.fullmatch(_DIGEST, value):
            self._add(number, line, self.keys.get("algorithm", ""), value, "")
            return True
        if re.fullmatch(_DIGEST, value):
            return False  # a file of that name
        self.keys["algorithm" if key == "algorithm" else "name"] = value
        return True

    def _end_stanza(self) -> None:
        for each in self.found[self.first :]:
            if not each.name and self.keys.get("name"):
                each.name, each.heading = self.keys["name"], ""
        self.first, self.keys = len(self.found), {}

    def _add(self, number: int, line: str, word: str, value: str, name: str) -> None:
        name = name.strip().strip("\"'")
        if name in ("-", "stdin", "(stdin)", "*stdin") or name.endswith(
            ("...", "\u2026")
        ):  # PowerShell cuts long paths
            name = ""
        algorithm = self._algorithm(word, len(value))
        digits = hex_of(value, algorithm) if algorithm in HEX_LENGTHS else value.lower()
        if digits:
            heading = self.heading if not name else ""
            self.found.append(_Entry(number, line, algorithm, digits, name, heading))

    def _algorithm(self, word: str, length: int) -> str:
        """What the line says, else what its section, the file's name or the length of the digest says."""
        if word:
            return algorithm_of(word) or word.lower()
        in_name = [match[1] for match in _WORD.finditer(unquote(urlsplit(self.where).path).rpartition("/")[2])]
        for each in (self.section, *reversed(in_name)):
            if each and _hex_length(each) == length:
                return algorithm_of(each) or each.lower()
        return next((name for name, size in HEX_LENGTHS.items() if size == length), f"unknown ({length} digits)")


def _hex_length(word: str) -> int:
    if known := algorithm_of(word):
        return HEX_LENGTHS[known]
    bits = re.search(r"(160|224|256|384|512)$", word)
    return int(bits[1]) // 4 if bits else 64 if word.lower().replace("-", "") in _HAVE_64 else 128


def _lines(text: str) -> Iterator[str]:
    """The lines of what is signed, if anything is, without the dashes of RFC 9580, 7.2; joined where PowerShell cut."""
    if _SIGNED in text:
        text = text.partition(_SIGNED)[2].partition(_SIGNATURE)[0]
        text = re.sub(r"(?m)^- ", "", re.sub(r"\A\s*(?:[A-Za-z-]+: .*\s*?\n)*", "", text.replace("\r\n", "\n")))
    if text.lstrip()[:1] in ("{", "["):  # JSON: each object is a stanza, each member a line
        text = re.sub(r"\",\s*\"", '",\n"', re.sub(r"[{}\[\]]", "\n\n", text))
    held = ""
    for line in re.split(r"\r\n|[\n\r\0]", text):
        if re.match(r"\s{8,}\S", line) and re.match(r"(Hash|Path)\s+: ", held):
            held += line.strip()
            continue
        yield held
        held = line
    yield held


#: The word for the algorithm (or nothing), the digest, and the name (or nothing).
_Found = list[tuple[str, str, str]]


def _tagged(line: str) -> _Found:
    head, _, rest = line.partition("(")
    name, closed, value = rest.rpartition(")")
    match = _TAG_VALUE.fullmatch(value)
    word = head.strip()
    if not closed or not match or not re.fullmatch(r"\\?[A-Za-z][\w/.-]{0,31}", word):
        return []
    return [(word.lstrip("\\"), match[1], _unescaped(name) if word.startswith("\\") else name)]


def _of_manifest(line: str) -> _Found:
    match = _MANIFEST.fullmatch(line)
    words = match[2].split() if match else []
    return [(word, value, match[1] if match else "") for word, value in zip(words[::2], words[1::2], strict=True)]


def _digest_first(line: str) -> _Found:
    match = _FIRST.fullmatch(line)
    if not match:
        return []
    escaped, value, rest = match.groups()
    name = rest.strip()
    name = name[1:] if name[:1] in ("*", "?", "^") and len(name) > 1 else name
    return [("", value, _unescaped(name) if escaped else name)]


def _unescaped(name: str) -> str:
    """Undo what coreutils does to names with line breaks and backslashes, which it says by a backslash at the begin."""
    return re.sub(r"\\([nr\\])", lambda match: {"n": "\n", "r": "\r"}.get(match[1], "\\"), name)


def _fields(line: str) -> _Found:
    """CSV, of Export-Csv and hashdeep."""
    fields = [each.strip().strip('"') for each in line.split(",")]
    digests = [each for each in fields if re.fullmatch(_DIGEST, each)]
    words = [each for each in fields if _WORD.fullmatch(each)]
    names = [each for each in fields if each and not each.isdecimal() and each not in digests + words]
    if len(fields) < 2 or not digests or not names:
        return []
    return [(words[0] if words else "", each, names[-1]) for each in digests]


def _prefixed(line: str) -> _Found:
    match = _PREFIXED.fullmatch(line)
    if not match or not _WORD.fullmatch(match[1]):
        return []
    return [(match[1], match[2], match[3].strip().lstrip("*"))]


def _digest_last(line: str) -> _Found:
    match = None if line.lstrip()[:1] in ("#", ";") else _LAST.search(line)
    if not match:
        return []
    name = line[: match.start()].rstrip(" \t:=,\"'")
    words = [each for each in _WORD.finditer(name) if each.end() == len(name) and each.start()]
    if words and not name[words[-1].start() - 1].isspace():
        words = []
    word = words[-1][1] if words else ""
    return [(word, match[1], name[: words[-1].start()].rstrip(" \t:=,") if words else name)]
