"""`ssvm config`: which file is in use, and how a new one is made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ssvm_worker import config
from ssvm_worker.cli import main
from tests.privileges import unprivileged


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
    "url", ["ftp://host/x", "s3://b", "file://srv/secondary", "/srv/x", "s3://", "nfs://h/e?foo=1", "nfs:///e"]
)
def test_check_of_stores(default: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    """check names each store whose URL no job could use."""
    default.parent.mkdir()
    default.write_text(f'[stores.a]\nurl = "file:///srv/a"\n[stores.b]\nurl = "{url}"\n[stores.c]\nurl = "x://y"\n')
    assert main(["config", "check"]) == 2
    shown = capsys.readouterr().err
    assert ("stores.a" in shown, "stores.b.url: " in shown, "stores.c.url: " in shown) == (False, True, True), shown


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("download.ca_file", '[download]\nca_file = "{}"'),
        ("stores.a.ca_file", '[stores.a]\nurl = "s3://bucket"\nca_file = "{}"'),
        ("vcenters.a.ca_file", '[vcenters.a]\nhost = "h"\nusername = "u"\npassword = "s3cret"\nca_file = "{}"'),
        ("credentials.a.private_key_file", '[credentials.a]\nprivate_key_file = "{}"'),
        ("serve.certificate_file", '[serve]\ncertificate_file = "{}"'),
        ("cloudstack.certificate_script", '[cloudstack]\ncertificate_script = "{}"'),
        ("download.allow_directories", '[download]\nallow_directories = ["/", "{}"]'),
    ],
)
def test_check_of_files(
    default: Path, public_root: Path, capsys: pytest.CaptureFixture[str], key: str, values: str
) -> None:
    """check names each file or directory that is missing, unreadable or of another kind, but other commands do not."""
    named = public_root / "named"
    settings = public_root / "worker.toml"
    settings.write_text(values.replace("{}", str(named)))
    check = ["config", "check", "--config", str(settings)]
    assert main(check) == 2
    shown = capsys.readouterr().err
    assert f"{key}: the " in shown, shown
    assert f"{named} cannot be read: No such file or directory. Create it" in shown, shown
    assert main(["config", "--config", str(settings)]) == 0
    is_directory = key == "download.allow_directories"
    named.mkdir(0o700) if is_directory else named.touch(0o600)
    assert main(check) == 0
    if os.geteuid() == 0:
        with unprivileged():
            assert main(check) == 2
        assert f"{named} cannot be read: Permission denied. Let this user read it" in capsys.readouterr().err
    named.rmdir() if is_directory else named.unlink()
    named.touch() if is_directory else named.mkdir()
    assert main(check) == 2
    assert f"{named} is not a {'directory' if is_directory else 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "keys"),
    [
        (
            'zoen = "a"\n[broker]\nulr = "redis://x"\n',
            ["broker.ulr: unknown, did you mean url?", "zoen: unknown, did you mean zone?"],
        ),
        ('[stores.a]\nurl = "s3://"\n[download]\nca_file = "/none"\n', ["stores.a.url: ", "download.ca_file: "]),
    ],
    ids=["syntax", "host"],
)
def test_each_problem_has_its_line(
    default: Path, capsys: pytest.CaptureFixture[str], wrong: str, keys: list[str]
) -> None:
    """check fails for wrong settings with one line for each problem, and --json has them in a list."""
    default.parent.mkdir()
    default.write_text(wrong)

    assert main(["config", "check"]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"ssvm: ConfigError: Invalid settings [{default}]. Correct these keys:"
    assert [line.startswith(f"  {key}") for line, key in zip(lines, keys, strict=True)] == [True, True], lines
    assert main(["config", "check", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    assert shown["problems"] == [line.strip() for line in lines]
    assert shown["what"] == f"Invalid settings: {'; '.join(shown['problems'])}"


def test_doctor_has_a_row_for_each_problem(default: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """doctor shows each problem of the settings in its own row, with the file."""
    default.parent.mkdir()
    default.write_text('zoen = "a"\n[broker]\nulr = "redis://x"\n')
    assert main(["doctor", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    details = [f"broker.ulr: unknown, did you mean url? [{default}]", f"zoen: unknown, did you mean zone? [{default}]"]
    assert [(row["check"], row["state"], row["detail"]) for row in rows] == [
        ("settings", "failed", detail) for detail in details
    ]
