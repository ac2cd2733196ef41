"""CloudStack's template.properties and volume.properties, so that its tools can read our stores.

The keys are those of its TemplateLocation: an entry is loadable with ``uniquename``, ``virtualsize`` and one format.
"""

from __future__ import annotations

import re
from typing import Any

from ssvm_worker.artifacts.manifest import Manifest


def properties(request: Any, manifest: Manifest) -> dict[str, bytes]:
    """The properties file of a downloaded artifact, by its name."""
    image = manifest.entries[0]
    file_name, size, digest = image.name, image.size, image.digest
    if image.facts["format"] == "ova":  # CloudStack looks for the unpacked files beside the name of the package
        file_name, size, digest = f"{manifest.artifact.id}.ova", manifest.source["size"], manifest.source["digests"][0]
    extension = file_name.rpartition(".")[2]
    name = request.name or manifest.artifact.id
    values = {
        "id": manifest.artifact.id,
        "uniquename": f"{manifest.artifact.account}-{manifest.artifact.id}",
        "filename": file_name,
        "description": name,
        "public": "false",
        "hvm": "true",
        "size": size,
        "virtualsize": image.facts["virtual_size"],
        "checksum": _cloudstack_checksum(digest),
        extension: "true",
        f"{extension}.filename": file_name,
        f"{extension}.size": size,
        f"{extension}.virtualsize": image.facts["virtual_size"],
    }
    listed_in = "volume.properties" if manifest.artifact.kind == "volume" else "template.properties"
    return {listed_in: to_java_properties(values)}


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
