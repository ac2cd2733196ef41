"""CloudStack's template.properties and volume.properties, with which its tools can read these stores.

The keys are those of its class TemplateLocation. It loads an entry with ``uniquename``, ``virtualsize`` and one format.
"""

from __future__ import annotations

import re
from typing import Any

from ssvm_worker.artifacts.manifest import Manifest

#: A key, an equals sign, a colon or a space, and the value. A backslash escapes the next character.
_LINE = re.compile(r"(?![#!])((?:\\.|[^\\=:\s])+)(?:\s*[=:]\s*|\s+|$)(.*)")


def properties(request: Any, manifest: Manifest) -> dict[str, bytes]:
    """Return the properties file of a downloaded artifact, by its name."""
    image = manifest.entries[0]
    file_name, size, digest = image.name, image.size, image.digest
    if image.facts["format"] == "ova":  # CloudStack expects the unpacked files next to the name of the package
        file_name, size, digest = package_name(manifest), manifest.source["size"], manifest.source["digests"][0]
    extension = file_name.rpartition(".")[2]
    name = getattr(request, "name", "") or manifest.artifact.id
    unique_name = getattr(request, "unique_name", "")
    values = {
        "id": manifest.artifact.id,
        "uniquename": unique_name or f"{manifest.artifact.account}-{manifest.artifact.id}",
        "filename": file_name,
        "description": name,
        "public": "true" if unique_name else "false",
        "hvm": "true",
        "size": size,
        "virtualsize": image.facts["virtual_size"],
        "checksum": digest and java_digest(digest),
        extension: "true",
        f"{extension}.filename": file_name,
        f"{extension}.size": size,
        f"{extension}.virtualsize": image.facts["virtual_size"],
    }
    listed_in = "volume.properties" if manifest.artifact.kind == "volume" else "template.properties"
    lines = (f"{_escape(key)}={_escape(str(value))}\n" for key, value in values.items())
    return {listed_in: "".join(lines).encode("ascii")}


def java_digest(digest: str) -> str:
    """Return a digest in CloudStack's form: ``{SHA-256}HEX``."""
    algorithm, _, hex_digest = digest.partition(":")
    return f"{{{algorithm.upper().replace('SHA', 'SHA-')}}}{hex_digest}"


def parse_properties(data: bytes) -> dict[str, str]:
    """Parse a file of java.util.Properties, as CloudStack writes them. Lines are not continued. Ignore other lines."""
    found: dict[str, str] = {}
    for line in data.decode("latin-1").splitlines():
        text = line.strip(" \t\f")
        if match := _LINE.fullmatch(text):
            found[_unescape(match[1])] = _unescape(match[2])
    return found


def _unescape(text: str) -> str:
    def character(found: re.Match[str]) -> str:
        code = found[1]
        return (
            chr(int(code[1:], 16)) if len(code) == 5 else {"n": "\n", "r": "\r", "t": "\t", "f": "\f"}.get(code, code)
        )

    units = re.sub(r"\\(u[0-9a-fA-F]{4}|.)", character, text)
    return units.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "replace")


def package_name(manifest: Manifest) -> str:
    """Return the name of an OVA's package, which may be absent."""
    stored = (each.name for each in manifest.entries if each.role == "package")
    return next(stored, f"{manifest.artifact.id}.ova")


def _escape(text: str) -> str:
    r"""Escape text for java.util.Properties. Characters outside ASCII become \uXXXX."""
    text = re.sub(r"([\\=:#!])", r"\\\1", text).replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    text = re.sub(r"^ ", r"\\ ", text)
    units = text.encode("utf-16-be")
    codes = (int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2))
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)
