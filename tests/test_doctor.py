"""`ssvm doctor` says of every dependency whether it is there, and what to do where it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ssvm_worker.doctor import Finding, examine
from ssvm_worker.settings import Settings
from tests.neighbours import free_port, missing


def conversion(scratch: Path | None) -> Finding:
    """What is found of conversions; nobody listens for the rest."""
    broker = {"url": f"redis://127.0.0.1:{free_port()}/0"}
    settings = Settings.model_validate({"broker": broker, "download": {"scratch_dir": scratch}})
    return next(each for each in examine(settings) if each.check == "conversion")


def test_conversion(tmp_path: Path) -> None:
    """Where images are converted, qemu-img and the directory are named."""
    if not shutil.which("qemu-img"):
        missing("qemu-img", "apt-get install qemu-utils")
    found = conversion(tmp_path)
    assert found.ok
    assert str(tmp_path) in found.detail
    assert "qemu-img" in found.detail


def test_no_conversion() -> None:
    """Where no images are converted, nothing is needed for it."""
    assert conversion(None) == Finding("conversion", True, "not wanted: download.scratch_dir is not set")


def test_conversion_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory or a tool that is not there is a failure that says which."""
    assert "No such file" in conversion(tmp_path / "away").detail
    monkeypatch.setenv("PATH", str(tmp_path))
    found = conversion(tmp_path)
    assert not found.ok
    assert "Install qemu-utils" in found.detail
