"""`ssvm config`: which file is in use, and how a new one is made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ssvm_worker import config
from ssvm_worker.cli import main


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the default settings file, which does not exist yet."""
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "etc" / "worker.toml")
    monkeypatch.delenv("SSVM_CONFIG", raising=False)
    return tmp_path / "etc" / "worker.toml"


def test_search_order(
    default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--config is before SSVM_CONFIG, which is before the default file."""

    def path(*argv: str) -> object:
        assert main(["config", "path", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)["path"]

    assert path() is None
    default.parent.mkdir()
    default.write_text("")
    assert path() == str(default)
    monkeypatch.setenv("SSVM_CONFIG", str(tmp_path / "b.toml"))
    assert path() == str(tmp_path / "b.toml")
    assert path("--config", "c.toml") == "c.toml"
    monkeypatch.setenv("SSVM_CONFIG", "")
    assert path() is None


def test_defaults_are_told(default: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a file and without variables, a command says on standard error that defaults are in force."""
    for name in [each for each in os.environ if each.startswith("SSVM_")]:
        monkeypatch.delenv(name)

    main(["list"])
    assert "ssvm: no settings file, so defaults are in force" in capsys.readouterr().err
    main(["list", "--quiet"])
    assert "no settings file" not in capsys.readouterr().err


def test_default_file_is_read(default: Path) -> None:
    """Without --config and SSVM_CONFIG, the settings are those of the default file."""
    default.parent.mkdir()
    default.write_text('zone = "north"')

    assert config.load(environ={}).zone == "north"


def test_init(default: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """init creates a valid file that only owner and group read, and never overwrites one."""
    assert main(["config", "init"]) == 0
    assert main(["config", "check"]) == 0
    assert default.stat().st_mode & 0o777 & ~0o640 == 0
    default.write_text("mine")
    assert main(["config", "init"]) == 2
    assert default.read_text() == "mine"
    assert "was not changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "file://srv/secondary", "/srv/x", "s3://", "nfs://h/e?foo=1", "nfs:///e"]
)
def test_check_of_stores(default: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    """check names each store whose URL no job could use."""
    default.parent.mkdir()
    default.write_text(f'[stores.a]\nurl = "file:///srv/a"\n[stores.b]\nurl = "{url}"\n[stores.c]\nurl = "x://y"\n')
    assert main(["config", "check"]) == 2
    shown = capsys.readouterr().err
    assert ("stores.a" in shown, "stores.b.url: " in shown, "stores.c.url: " in shown) == (False, True, True), shown


def test_check_reports_all(default: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check fails for wrong settings, and names every wrong key."""
    default.parent.mkdir()
    default.write_text('zoen = "a"\n[broker]\nulr = "redis://x"\n')

    assert main(["config", "check"]) != 0
    shown = capsys.readouterr().err
    assert "did you mean zone?" in shown
    assert "did you mean url?" in shown
