"""`ssvm install-files` keeps the changes of an operator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssvm_worker.cli import main


def test_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A changed file stays, unless the user gives --force; the settings are not readable for everyone."""

    def state(*more: str) -> str:
        assert main(["install-files", str(tmp_path), "--json", *more]) == 0
        return {row["file"]: row["state"] for row in json.loads(capsys.readouterr().out)}["worker.toml"]

    assert state() == "written"
    settings = tmp_path / "worker.toml"
    assert settings.stat().st_mode & 0o777 == 0o640
    original = settings.read_text()
    assert state() == "unchanged"
    settings.write_text("mine")
    assert (state(), settings.read_text()) == ("kept", "mine")
    assert (state("--force"), settings.read_text()) == ("written", original)


def test_unwritable(capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that cannot be created is an error that names it."""
    assert main(["install-files", "/proc/nowhere"]) == 2
    assert "/proc/nowhere" in capsys.readouterr().err
