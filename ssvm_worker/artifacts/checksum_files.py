"""Find the digest of one file in a checksum file, as publishers, tools and operating systems write it.

HEX  name   HEX *name                 coreutils, shasum; below "# SHA512 HASH" (Gentoo) or "SHA256:" (Debian)
SHA256 (name) = HEX                   BSD, coreutils --tag; OpenSSL 1 "SHA256(name)= ", OpenSSL 3 "SHA2-256(name)= "
name: HEX   name HEX                  many web pages
Algorithm : SHA256 / Hash / Path      PowerShell's Get-FileHash, as a list, a table, CSV or JSON
SHA256 hash of name: / HEX            certutil; before Windows 10 with blanks between the bytes
name: HEX HEX … / HEX HEX …           gpg --print-md, in groups of digits; --print-mds has "SHA256 = " before them
HEX                                   without a name: the digest of the requested file
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
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # starts with the mark of UTF-16, so it is tested first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: The longest line in characters that is read. A path has at most 4096.
_MAX_LINE = 8192
_SIGNED = "-----BEGIN PGP SIGNED MESSAGE-----"
_SIGNATURE = "-----BEGIN PGP SIGNATURE-----"
#: Names of algorithms in a text. It includes algorithms that the worker cannot compute: their digests must not count
#: as digests of other algorithms.
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
_GROUP = "(?:[0-9A-F]{8}|[0-9A-F]{4}|[0-9A-F]{2})"
_MORE_GROUPS = re.compile(rf"\s*{_GROUP}(?: {{1,2}}{_GROUP})*\s*")
_GROUPED = re.compile(rf"\s*(?:(\S.*):\s+)?(?:([A-Z]+\d+) = )?({_GROUP}(?: {{1,2}}{_GROUP})+)\s*")
_KEY = re.compile(r"""\s*["']?(algorithm|hash|path|file ?name|file|name)["']?\s{0,16}[:=]\s*["']?(.*)""", re.IGNORECASE)
#: Algorithms without bits in their name whose digests have 64 hex digits. Digests of the others have 128.
_HAVE_64 = ("blake2s", "blake3", "b3", "sm3", "tiger")


@dataclass
class _Entry:
    """One digest, and the file that it belongs to according to the checksum file."""

    number: int
    line: str
    algorithm: str
    hex: str
    #: Empty if the line names no file.
    name: str = ""
    #: The line above. It may name the file at its end, after words of any language.
    heading: str = ""


def decode_text(data: bytes) -> str:
    """Decode a small text.

    It may be UTF-8, UTF-16 or UTF-32 with a byte order mark, UTF-8 or UTF-16 without one, or else Windows-1252.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    if len(data) > 3 and not (any(data[1:40:2]) and any(data[0:40:2])):
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def find_in_sums(sums: str, path: str, location: str, allowed: Sequence[str] = tuple(HEX_LENGTHS)) -> Digest:
    """Return the digest of the file at *path* (of its URL), by the strongest of the *allowed* algorithms.

    *location* is the URL of the checksum file. Names in the file are relative to this URL. The last part of the URL
    may name the algorithm. A name with other directories counts if there is no better match.
    Raises InvalidRequest if there is no digest, no digest of an allowed algorithm, or two different digests.
    """
    file_name = path.rpartition("/")[2]
    if "<html" in sums[:4096].lower() or sums.lstrip()[:9].lower() == "<!doctype":
        what = f"The checksum file is a web page, so it names no {file_name!r}"
        raise InvalidRequest(what, location, "Give the URL of the checksum file itself")
    found = _best_matches(_Reader(location).read(sums), path, location)
    if not found:
        what = f"The checksum file names no {file_name!r}"
        raise InvalidRequest(what, location, "Give the digest itself, or the sums file of this image")
    known = [each for each in found if each.algorithm in HEX_LENGTHS]
    if not known:
        names = ", ".join(dict.fromkeys(each.algorithm[:40] for each in found))
        what = f"The checksum file has only {names} for {file_name!r}"
        raise InvalidRequest(what, location, f"Give a digest of one of these algorithms: {', '.join(allowed)}")
    usable = [each for each in known if each.algorithm in allowed]
    if not usable:
        names = ", ".join(dict.fromkeys(each.algorithm for each in known))
        what = f"download.checksums does not allow {names} checksums"
        raise InvalidRequest(what, "checksum", f"Give one of {', '.join(allowed)}")
    strongest = max(usable, key=lambda each: HEX_LENGTHS[each.algorithm])
    for other in usable:
        if other.algorithm == strongest.algorithm and other.hex != strongest.hex:
            lines = [f"line {each.number} ({each.line.strip()[:200]!a})" for each in (strongest, other)]
            what = f"The checksum file has two digests for {file_name!r}: {' and '.join(lines)}"
            raise InvalidRequest(what, location, "Give the digest itself")
    return Digest(strongest.algorithm, strongest.hex)


def _best_matches(entries: list[_Entry], path: str, location: str) -> list[_Entry]:
    """Return the entries whose name matches best. If no entry has a name, return all of them."""
    wanted = _parts(path)
    home = _parts(unquote(urlsplit(location).path).rpartition("/")[0])
    ranks = [_rank(each, wanted, home) for each in entries]
    best = max(ranks, default=_NOT_NAMED)
    if best > _NOT_NAMED:
        return [each for each, rank in zip(entries, ranks, strict=True) if rank == best]
    is_named = any(each.name or set(each.heading.rpartition(" ")[2]) & set("./\\") for each in entries)
    return [] if is_named else entries


#: How well a name matches. First 3: the same path, 2: all parts of the name, 1: some of its last parts. Then the number
#: of equal parts.
_Rank = tuple[int, int]
_NOT_NAMED: _Rank = (0, 0)


def _rank(entry: _Entry, wanted: list[str], home: list[str]) -> _Rank:
    if entry.heading and wanted and re.search(rf"(?:^|[\s/\\\"'(]){re.escape(wanted[-1])}$", entry.heading):
        return 1, 1
    # 7-Zip and Debian write the size before the name.
    spellings = {entry.name, unquote(entry.name), re.sub(r"^\d+\s+", "", entry.name)}
    return max(_fit(_parts(each), wanted, home) for each in spellings)


def _fit(parts: list[str], wanted: list[str], home: list[str]) -> _Rank:
    same = 0
    while same < min(len(parts), len(wanted)) and parts[-1 - same] == wanted[-1 - same]:
        same += 1
    if not same:
        return _NOT_NAMED
    return 3 if home + parts == wanted else 2 if same == len(parts) else 1, same


def _parts(path: str) -> list[str]:
    """Split a path at the separators of any system. Compose Unicode, because macOS writes it decomposed."""
    names: list[str] = []
    for each in re.split(r"[/\\]+", unicodedata.normalize("NFC", path)):
        if each == "..":
            names = names[:-1]
        elif each not in ("", ".") and not re.fullmatch("[A-Za-z]:", each):
            names.append(each)
    return names


@dataclass
class _Reader:
    """Parser of a checksum file. Lines above a digest may name its algorithm or its file."""

    #: The URL of the checksum file.
    location: str
    found: list[_Entry] = field(default_factory=list)
    #: The algorithm in the last heading, and the heading itself if it may also name a file.
    section: str = ""
    heading: str = ""
    #: The current stanza, which ends at a blank line: the index of its first entry, and the values of its keys.
    first: int = 0
    keys: dict[str, str] = field(default_factory=dict)

    def read(self, text: str) -> list[_Entry]:
        """Return the digests in the order of their lines."""
        for number, line in enumerate(_lines(text)):  # the first line is empty, so numbers start at 1
            if not line.strip():
                self._end_stanza()
            elif len(line) <= _MAX_LINE:
                self._read_line(number, line)
        self._end_stanza()
        return self.found

    def _read_line(self, number: int, line: str) -> None:
        if _BYTES.fullmatch(line):
            line = line.replace(" ", "")
        if self._read_key(number, line):
            return
        for form in (_tagged, _of_manifest, _grouped, _digest_first, _fields, _prefixed, _digest_last):
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
        """Read a line ``key: value`` of PowerShell's list or of a similar stanza. Return False for any other line."""
        match = _KEY.fullmatch(line)
        if not match:
            return False
        key, value = match[1].lower(), match[2].rstrip(" ,\"'\t")
        if key == "hash" and re.fullmatch(_DIGEST, value):
            self._add(number, line, self.keys.get("algorithm", ""), value, "")
            return True
        if re.fullmatch(_DIGEST, value):
            return False  # a file with the name of a key
        self.keys["algorithm" if key == "algorithm" else "name"] = value
        return True

    def _end_stanza(self) -> None:
        for each in self.found[self.first :]:
            if not each.name and self.keys.get("name"):
                each.name, each.heading = self.keys["name"], ""
        self.first, self.keys = len(self.found), {}

    def _add(self, number: int, line: str, word: str, value: str, name: str) -> None:
        name = name.strip().strip("\"'")
        is_cut = name.endswith(("...", "\u2026"))  # PowerShell shortens long paths
        if is_cut or name in ("-", "stdin", "(stdin)", "*stdin"):
            name = ""
        algorithm = self._algorithm(word, len(value))
        digits = hex_of(value, algorithm) if algorithm in HEX_LENGTHS else value.lower()
        if digits:
            heading = self.heading if not name else ""
            self.found.append(_Entry(number, line, algorithm, digits, name, heading))

    def _algorithm(self, word: str, length: int) -> str:
        """Return the algorithm.

        The word on the line determines it, else the heading, the name of the checksum file, or the length.
        """
        if word:
            return algorithm_of(word) or word.lower()
        in_name = [match[1] for match in _WORD.finditer(unquote(urlsplit(self.location).path).rpartition("/")[2])]
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
    """Yield the lines of the text, or of its signed part, without the dashes of RFC 9580, section 7.2.

    Lines that PowerShell or gpg has wrapped are joined.
    """
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
        # gpg breaks the line before or within a long digest.
        if _MORE_GROUPS.fullmatch(line) and (held.endswith(": ") or _GROUPED.fullmatch(held)):
            held += f" {line.strip()}"
            continue
        yield held
        held = line
    yield held


#: For each digest: the word for the algorithm or "", the digest, and the name or "".
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


def _grouped(line: str) -> _Found:
    match = _GROUPED.fullmatch(line)
    digits = re.sub(r"\s", "", match[3]) if match else ""
    return [(match[2] or "", digits, match[1] or "")] if match and len(digits) in HEX_LENGTHS.values() else []


def _digest_first(line: str) -> _Found:
    match = _FIRST.fullmatch(line)
    if not match:
        return []
    escaped, value, rest = match.groups()
    name = rest.strip()
    name = name[1:] if name[:1] in ("*", "?", "^") and len(name) > 1 else name
    return [("", value, _unescaped(name) if escaped else name)]


def _unescaped(name: str) -> str:
    """Decode a name that coreutils has escaped: a backslash at the start of the line marks such names."""
    return re.sub(r"\\([nr\\])", lambda match: {"n": "\n", "r": "\r"}.get(match[1], "\\"), name)


def _fields(line: str) -> _Found:
    """Read a line of CSV, as Export-Csv and hashdeep write it."""
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
