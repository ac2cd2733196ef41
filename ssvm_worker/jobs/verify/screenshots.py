"""Screenshots of booted backups, kept on the machine that booted them for as long as a store has the backup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssvm_worker.artifacts.layout import Artifact, place_of
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.errors import Cancelled, WorkerError
from ssvm_worker.jobs.attempt import Attempt


def screen_of(folder: Path, artifact: Artifact) -> Path:
    """Where the screenshot of a backup lies."""
    return folder / f"{artifact.prefix}.png"


def drop_screen(attempt: Attempt, artifact: Artifact, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove this machine's screenshot of a backup that no store has; returns what went, or would, as clean-up tells.

    It stays where a store does not answer; nothing that keeps it here is an error.
    """
    path = screen_of(attempt.boots.folder, artifact) if attempt.boots.folder else None
    if path is None or not path.is_file() or _may_be_there(attempt, artifact):
        return []
    try:
        size = path.stat().st_size
        if not dry_run:
            path.unlink()
    except OSError as error:
        attempt.log.warning("a screenshot stays: %s", error)
        return []
    told = {"store": "boot", "what": "screenshot", "where": str(path), "objects": 1, "bytes": size}
    return [told | {"why": "no store has that backup"}]


def drop_screens(attempt: Attempt, volume: str, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """The same for all that lie here, or for those of one volume, ``snapshots/ACCOUNT/VOLUME``."""
    found = []
    if folder := attempt.boots.folder:
        for path in sorted(folder.glob(f"{volume or 'snapshots/*/*'}/*.png")):
            if place := place_of(f"{path.relative_to(folder).with_suffix('')}/x"):
                found += drop_screen(attempt, Artifact.of_prefix(place), dry_run=dry_run)
    return found


def _may_be_there(attempt: Attempt, artifact: Artifact) -> bool:
    try:
        return any(find_manifest(attempt.store(name), artifact) for name in attempt.stores)
    except Cancelled:
        raise
    except WorkerError as error:
        attempt.log.info("the screenshot of %s stays: %s", artifact.prefix, error)
        return True
