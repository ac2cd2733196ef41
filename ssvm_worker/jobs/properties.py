"""CloudStack's template.properties and volume.properties, so that its tools can read our stores.

The keys are those of its TemplateLocation: an entry is loadable with ``uniquename``, ``virtualsize`` and one format.
"""

from __future__ import annotations

import re
from typing import Any

from ssvm_worker.manifest import Manifest


def properties(request: Any, manifest: Manifest) -> dict[str, bytes]:
    """The properties file of a downloaded artifact, by its name."""
    image = manifest.entries[0]
    extension = image.name.rpartition(".")[2]
    name = request.name or manifest.artifact.id
    values = {
        "id": manifest.artifact.id,
        "uniquename": f"{manifest.artifact.account}-{manifest.artifact.id}",
        "filename": image.name,
        "description": name,
        "public": "false",
        "hvm": "true",
        "size": image.size,
        "virtualsize": image.facts["virtual_size"],
        "checksum": _cloudstack_checksum(image.digest),
        extension: "true",
        f"{extension}.filename": image.name,
        f"{extension}.size": image.size,
        f"{extension}.virtualsize": image.facts["virtual_size"],
    }
    file_name = "volume.properties" if manifest.artifact.kind == "volume" else "template.properties"
    return {file_name: to_java_properties(values)}


def _cloudstack_checksum(digest: str) -> str:
    """``sha256:HEX`` as CloudStack writes it: ``{SHA-256}HEX``."""
    algorithm, _, value = digest.partition(":")
    return f"{{{algorithm.upper().replace('SHA', 'SHA-')}}}{value}"


def to_java_properties(values: dict[str, Any]) -> bytes:
    """``key=value`` lines as java.util.Properties reads them: Latin-1, the rest as \\uXXXX."""
    return "".join(f"{_escape(key)}={_escape(str(value))}\n" for key, value in values.items()).encode("ascii")


def _escape(text: str) -> str:
    text = re.sub(r"([\\=:#!])", r"\\\1", text).replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    text = re.sub(r"^ ", r"\\ ", text)
    units = text.encode("utf-16-be")
    codes = (int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2))
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)
