"""Which disks a backup lacks that were wanted."""

from __future__ import annotations

from typing import Any

from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.vmware.hardware import INDEPENDENT, MISSING, RDM


def lost_disks(manifest: Manifest) -> list[dict[str, Any]]:
    """What the manifest says of each of them; a disk that the request left out, by naming others, is no loss."""
    wanted = (manifest.source.get("request") or {}).get("disks")
    lost = (MISSING,) if wanted else (MISSING, INDEPENDENT, RDM)
    return [each for each in manifest.facts.get("disks", []) if each["status"] in lost]
