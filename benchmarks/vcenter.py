"""A vCenter over TLS with one VM in it, and govc to compare with."""

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

from ssvm_worker.demo.simulator import SimulatedMachine, VCenterSimulator, find_go
from ssvm_worker.demo.vmdk import (
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
#: Grains that differ; their streams are repeated, as deflating all would take longer than all the runs.
_DISTINCT = 64
SNAPSHOT = "before"


@dataclass(frozen=True)
class Lab:
    """What a bench needs of a vCenter."""

    simulator: VCenterSimulator
    vm: SimulatedMachine
    #: Bytes in which its disk is sent; the disk has twice as many.
    sent: int
    govc: str
    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What govc is told by its environment."""
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
        """The part of the worker's settings that leads here."""
        return (
            f'state_dir = "{self.root}/state"\n[vcenters.vc1]\nhost = "{self.simulator.host}"\n'
            f'port = {self.simulator.port}\nusername = "{self.simulator.username}"\n'
            f'password = "{self.simulator.password}"\nca_file = "{self.simulator.ca_file}"\n'
        )

    def tell(self, *words: str) -> None:
        """Let govc do something that is not measured."""
        done = subprocess.run([self.govc, *words], env=os.environ | self.environment, capture_output=True, text=True)
        if done.returncode:
            raise Broken(f"govc {words[0]}: {done.stderr[-2000:]}")


@contextlib.contextmanager
def lab(root: Path, size: int) -> Iterator[Lab]:
    """A VM whose disk is sent in about *size* bytes and has a snapshot; its files are in memory if *root* is."""
    (root / "store").mkdir()
    govc = _build(root)
    before, tempfile.tempdir = tempfile.tempdir, str(root)
    try:
        with VCenterSimulator() as simulator:
            content = stream(size)
            vm = simulator.add_vm("bench", [content], [capacity_of(size)])
            made = Lab(simulator, vm, len(content), govc, root)
            del content
            made.tell("snapshot.create", "-vm", vm.path, "-m=false", SNAPSHOT)
            yield made
    finally:
        tempfile.tempdir = before


def has_go() -> bool:
    """Whether the simulator and govc can be built."""
    return find_go() is not None


def _build(root: Path) -> str:
    """Build govc; Go's own cache makes it quick but for the first time."""
    built = root / "govc"
    command = [find_go() or "go", "build", "-mod=readonly", "-buildvcs=false", "-o", str(built), "."]
    done = subprocess.run(command, cwd=_SOURCES, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"govc cannot be built: {done.stderr[-2000:]}")
    return str(built)


def capacity_of(size: int) -> int:
    """Bytes of the disk that ``stream`` sends in *size* bytes."""
    return -(-2 * size // GRAIN) * GRAIN


def stream(size: int, distinct: int = _DISTINCT) -> bytes:
    """A streamOptimized VMDK of about *size* bytes: every grain of a disk twice as large, of which half is noise.

    So many grains differ.
    """
    noise = random.Random(1)
    grains = [vmdk_grain(0, noise.randbytes(GRAIN // 2) + b"text" * (GRAIN // 8)) for _ in range(distinct)]
    sectors = capacity_of(size) // SECTOR
    pieces = [padded(vmdk_header(capacity=sectors) + padded(vmdk_descriptor(sectors), 20 * SECTOR), GRAIN)]
    at, places = GRAIN // SECTOR, []
    for number in range(sectors * SECTOR // GRAIN):
        grain = grains[number % distinct]
        pieces.append(struct.pack("<Q", number * GRAIN // SECTOR) + grain[8:])
        places.append(at)
        at += len(grain) // SECTOR
    directory = []
    for start in range(0, len(places), _ENTRIES):
        table = places[start : start + _ENTRIES]
        pieces.append(vmdk_marker(4, MARKER_GT) + padded(struct.pack(f"<{len(table)}I", *table), 4 * SECTOR))
        directory.append(at + 1)
        at += 5
    packed = padded(struct.pack(f"<{len(directory)}I", *directory), SECTOR)
    pieces.append(vmdk_marker(len(packed) // SECTOR, MARKER_GD) + packed)
    pieces.append(vmdk_marker(1, MARKER_FOOTER) + vmdk_header(capacity=sectors, gd_offset=at + 1))
    return b"".join([*pieces, vmdk_marker(0, MARKER_EOS)])
