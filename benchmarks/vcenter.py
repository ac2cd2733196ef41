"""A simulated vCenter over TLS with one VM, and govc for the comparison."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.demo.go_program import build_program, find_go
from ssvm_worker.demo.simulator import SimulatedMachine, VCenterSimulator
from tests.vmdk_writer import (
    GRAIN,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    SECTOR,
    padded,
    vmdk_descriptor,
    vmdk_grain,
    vmdk_header,
    vmdk_marker,
)

from .contest import Broken

_SOURCES = Path(__file__).with_name("govc")
_ENTRIES = 512
#: Different grains. Their streams are repeated, because deflating all grains would take longer than all runs.
_DISTINCT = 64
SNAPSHOT = "before"


@dataclass(frozen=True)
class Lab:
    """A vCenter with one VM, and the settings for both sides of a benchmark."""

    simulator: VCenterSimulator
    vm: SimulatedMachine
    #: Bytes of the stream in which the host sends the disk. The disk is twice as large.
    sent: int
    govc: str
    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables for govc."""
        return {
            "GOVC_URL": f"https://{self.simulator.host}:{self.simulator.port}/sdk",
            "GOVC_USERNAME": self.simulator.username,
            "GOVC_PASSWORD": self.simulator.password,
            "GOVC_TLS_CA_CERTS": str(self.simulator.ca_file),
            "GOVC_PERSIST_SESSION": "false",
            "GOVMOMI_HOME": str(self.root),
        }

    @property
    def settings(self) -> str:
        """Return the worker's settings for this vCenter."""
        return (
            f'state_dir = "{self.root}/state"\n[vcenters.vc1]\nhost = "{self.simulator.host}"\n'
            f'port = {self.simulator.port}\nusername = "{self.simulator.username}"\n'
            f'password = "{self.simulator.password}"\nca_file = "{self.simulator.ca_file}"\n'
        )

    def govc_run(self, *words: str) -> None:
        """Run a govc command that is not measured."""
        done = subprocess.run([self.govc, *words], env=os.environ | self.environment, capture_output=True, text=True)
        if done.returncode:
            raise Broken(f"govc {words[0]}: {done.stderr[-2000:]}")


@contextlib.contextmanager
def lab(root: Path, size: int) -> Iterator[Lab]:
    """Run a vCenter with one VM that has a snapshot and whose disk stream has about *size* bytes.

    Its files are below *root*.
    """
    (root / "store").mkdir()
    govc = str(build_program("govc", _SOURCES))
    before, tempfile.tempdir = tempfile.tempdir, str(root)
    try:
        with VCenterSimulator() as simulator:
            content = stream(size)
            vm = simulator.add_vm("bench", [content], [capacity_of(size)])
            made = Lab(simulator, vm, len(content), govc, root)
            del content
            made.govc_run("snapshot.create", "-vm", vm.path, "-m=false", SNAPSHOT)
            yield made
    finally:
        tempfile.tempdir = before


def has_go() -> bool:
    """Return whether the simulator and govc can be built."""
    return find_go() is not None


def capacity_of(size: int) -> int:
    """Return the bytes of the disk whose stream has *size* bytes."""
    return -(-2 * size // GRAIN) * GRAIN


def stream(size: int, distinct: int = _DISTINCT) -> bytes:
    """Return a streamOptimized VMDK of about *size* bytes with all grains of a disk twice as large.

    Half of each grain is noise. *distinct* grains differ.
    """
    noise = random.Random(1)
    grains = [vmdk_grain(0, noise.randbytes(GRAIN // 2) + b"text" * (GRAIN // 8)) for _ in range(distinct)]
    sectors = capacity_of(size) // SECTOR
    pieces = [padded(vmdk_header(capacity=sectors) + padded(vmdk_descriptor(sectors), 20 * SECTOR), GRAIN)]
    sector, grain_sectors = GRAIN // SECTOR, []
    for number in range(sectors * SECTOR // GRAIN):
        grain = grains[number % distinct]
        pieces.append(struct.pack("<Q", number * GRAIN // SECTOR) + grain[8:])
        grain_sectors.append(sector)
        sector += len(grain) // SECTOR
    directory = []
    for start in range(0, len(grain_sectors), _ENTRIES):
        table = grain_sectors[start : start + _ENTRIES]
        pieces.append(vmdk_marker(4, MARKER_GT) + padded(struct.pack(f"<{len(table)}I", *table), 4 * SECTOR))
        directory.append(sector + 1)
        sector += 5
    packed = padded(struct.pack(f"<{len(directory)}I", *directory), SECTOR)
    pieces.append(vmdk_marker(len(packed) // SECTOR, MARKER_GD) + packed)
    pieces.append(vmdk_marker(1, MARKER_FOOTER) + vmdk_header(capacity=sectors, gd_offset=sector + 1))
    return b"".join([*pieces, vmdk_marker(0, MARKER_EOS)])
