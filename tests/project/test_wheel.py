"""The wheel in an empty virtual environment, without any extra: it has all files, and names a missing extra."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import images
from tests.neighbours import ROOT, missing
from tests.servers.http import HttpServer

CONFIG = ROOT / "config"
#: The oldest and the newest minor version of Python 3 that the product supports.
VERSIONS = range(11, 15)


def run(*command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command without this process's settings and Python paths."""
    hidden = ("SSVM_", "FLOWER_", "PYTHONPATH", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(command, text=True, capture_output=True, env=clean | {"SSVM_CONFIG": ""} | environ)


def must(*command: str | Path, **environ: str) -> str:
    """Run a command that must succeed, and return its standard output."""
    done = run(*command, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def uv() -> str:
    """Return the path of uv, which `make install` downloads."""
    if (found := shutil.which("uv", path=f"{os.environ['PATH']}:{ROOT / '.uv/bin'}")) is None:
        missing("uv", "run `make install`")
    return found


def python(minor: int) -> str:
    """Return the path of this version of Python: the running one, that of PATH, or that of pyenv."""
    if minor == sys.version_info.minor:
        return sys._base_executable  # type: ignore[attr-defined]
    installed = [shutil.which(f"python3.{minor}"), *(Path.home() / ".pyenv/versions").glob(f"3.{minor}.*/bin/python3")]
    for each in installed:  # a command of pyenv on PATH may be only a hint at a version that is not active
        if each and run(each, "--version").returncode == 0:
            return str(each)
    pytest.skip(f"Python 3.{minor} is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel, built from the files of the Dockerfile, beside the locked versions of its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    [stage] = re.findall(r" AS build\n(.*?)\nFROM ", (ROOT / "Dockerfile").read_text(), re.S)
    for source, target in re.findall(r"^COPY (.+) (\S+)$", stage, re.M):
        for each in source.split():
            place = folder / "source" / target / ("" if target == each else each)
            copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
            place.parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / each, place)
    must(uv(), "build", "--quiet", "--wheel", "--out-dir", folder, folder / "source")
    locked = ("export", "--quiet", "--project", ROOT, "--locked", "--no-default-groups", "--no-emit-project")
    must(uv(), *locked, "--no-hashes", "--output-file", folder / "locked.txt")
    [found] = folder.glob("*.whl")
    return found


def install(wheel: Path, folder: Path, minor: int) -> Path:
    """Install the wheel into a new environment, and return the directory of its programs."""
    must(uv(), "venv", "--quiet", "--python", python(minor), folder)
    locked = wheel.with_name("locked.txt")
    must(uv(), "pip", "install", "--quiet", "--python", folder / "bin/python", "--constraints", locked, wheel)
    return folder / "bin"


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an installation on the running Python."""
    return install(wheel, tmp_path_factory.mktemp("empty") / "venv", sys.version_info.minor)


def files(folder: Path) -> set[str]:
    """Return the paths of the files in a directory, without bytecode."""
    found = (each.relative_to(folder) for each in folder.rglob("*") if each.is_file())
    return {str(each) for each in found if "__pycache__" not in each.parts}


def test_files(programs: Path, tmp_path: Path) -> None:
    """`ssvm install-files` writes every file of config/, with the path of this installation; Flower has its overlay."""
    must(programs / "ssvm", "install-files", tmp_path / "files")
    assert files(tmp_path / "files") == files(CONFIG)
    for name in files(CONFIG):
        expected = (CONFIG / name).read_text().replace("/opt/ssvm-worker/.venv/", f"{programs.parent}/")
        assert (tmp_path / "files" / name).read_text() == expected
    unit = (tmp_path / "files/systemd/ssvm-worker@.service").read_text()
    assert f"ExecStart={programs}/ssvm worker\n" in unit
    [overlay] = programs.parent.glob("lib/python*/site-packages/tasks/flower")
    assert files(overlay) == files(ROOT / "tasks/flower")


#: A command, the extra that it needs, and the broker of the settings.
COMMANDS = [
    ("ssvm_worker worker", "embedded", "embedded"),
    ("ssvm_worker demo", "embedded", ""),
    ("ssvm_worker flower", "flower", ""),
    ("ssvm_worker metrics", "metrics", ""),
    ("ssvm_worker serve", "serve", ""),
    ("tasks worker", "embedded", "embedded"),
    ("tasks beat -S redbeat.RedBeatScheduler", "redbeat", ""),
]


def test_missing_extra(programs: Path) -> None:
    """A command whose extra is not installed starts nothing, ends with 2, and names the extra."""
    for command, extra, url in COMMANDS:
        environ = {"SSVM_BROKER__URL": url} if url else {}
        done = run(programs / "python", "-P", "-m", *command.split(), **environ)
        assert done.returncode == 2, done
        assert f"pip install 'ssvm-worker[{extra}]'" in done.stderr, done
        assert "Traceback" not in done.stderr, done


def test_job(programs: Path, http_server: HttpServer, tmp_path: Path) -> None:
    """The base dependencies run a job."""
    download(programs, http_server, tmp_path)


@pytest.mark.install
@pytest.mark.parametrize("minor", [each for each in VERSIONS if each != sys.version_info.minor], ids=lambda m: f"3.{m}")
def test_other_pythons(wheel: Path, http_server: HttpServer, tmp_path: Path, minor: int) -> None:
    """The base dependencies run a job on each version of Python that this machine has."""
    download(install(wheel, tmp_path / "venv", minor), http_server, tmp_path)


def download(programs: Path, server: HttpServer, folder: Path) -> None:
    """Download an image to a directory store."""
    (folder / "store").mkdir()
    store = {"SSVM_STORES__PRIMARY__URL": f"file://{folder / 'store'}"}
    allowed = {"SSVM_DOWNLOAD__ALLOW_NETWORKS": "127.0.0.0/8"}
    words = ("run", "download", "--url", server.serve("a.iso", images.iso()), "--account", "1", "--id", "1", "--json")
    assert json.loads(must(programs / "ssvm", *words, **store, **allowed))["format"] == "iso"
