"""Screenshots of booted backups. The machine that booted a backup keeps its screenshot while a store has the backup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssvm_worker.artifacts.layout import Artifact, place_of
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.errors import Cancelled, WorkerError
from ssvm_worker.jobs.attempt import Attempt


def screenshot_path(folder: Path, artifact: Artifact) -> Path:
    """Return the path of a backup's screenshot."""
    return folder / f"{artifact.prefix}.png"


def remove_screenshot(attempt: Attempt, artifact: Artifact, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Remove this machine's screenshot of a backup that no store has. Return clean-up's finding of it.

    The screenshot stays if a store does not answer. Errors are only logged.
    """
    path = screenshot_path(attempt.settings.boot_dir, artifact)
    if not path.is_file() or _may_exist(attempt, artifact):
        return []
    try:
        size = path.stat().st_size
        if not dry_run:
            path.unlink()
    except OSError as error:
        attempt.log.warning("a screenshot is not removed: %s", error)
        return []
    finding = {"store": "boot", "what": "screenshot", "where": str(path), "objects": 1, "bytes": size}
    return [finding | {"why": "no store has that backup"}]


def remove_screenshots(attempt: Attempt, volume: str, *, dry_run: bool = False) -> list[dict[str, Any]]:
    """Do the same for all screenshots of this machine, or of one volume, ``snapshots/ACCOUNT/VOLUME``."""
    found, folder = [], attempt.settings.boot_dir
    for path in sorted(folder.glob(f"{volume or 'snapshots/*/*'}/*.png")):
        if place := place_of(f"{path.relative_to(folder).with_suffix('')}/x"):
            found += remove_screenshot(attempt, Artifact.of_prefix(place), dry_run=dry_run)
    return found


def _may_exist(attempt: Attempt, artifact: Artifact) -> bool:
    try:
        return any(find_manifest(attempt.store(name), artifact) for name in attempt.stores)
    except Cancelled:
        raise
    except WorkerError as error:
        attempt.log.info("the screenshot of %s stays: %s", artifact.prefix, error)
        return True
