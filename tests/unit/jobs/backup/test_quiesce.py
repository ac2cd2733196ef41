"""Quiescing: required, if possible or not wanted, with each way in which a real guest fails."""

from __future__ import annotations

import pytest

from ssvm_worker.config.schema import BackupSection
from ssvm_worker.errors import SourceUnavailable, WorkerError
from tests.backup_bench import FAST, Bench
from tests.servers.vcenter import TestVM

# Each test states the findings for one vCenter.
pytestmark = pytest.mark.plain_vcenter

GUEST_FAULTS = ["ApplicationQuiesceFault", "GenericVmConfigFault", "ToolsUnavailable", "NotSupported", "SystemError"]


@pytest.fixture
def running(bench: Bench, vm: TestVM) -> TestVM:
    """Return a VM that is on."""
    with bench.session(vm) as it:
        it._connection.finish(it._vm.PowerOnVM_Task(), 60)
    return vm


@pytest.mark.parametrize("fault", GUEST_FAULTS)
def test_falls_back(bench: Bench, running: TestVM, fault: str) -> None:
    """If quiescing is wanted if possible, any fault of the guest leads to a crash-consistent backup with a warning."""
    bench.vcenter.fault(quiesce_task=fault)
    result = bench.run(running)
    assert result["quiesced"] is False
    [warning] = [each for each in result["warnings"] if each["check"] == "quiescing"]
    assert fault in warning["detail"]


def test_silently_not_quiesced(bench: Bench, running: TestVM) -> None:
    """A snapshot that vSphere silently did not quiesce is a warning with the state of the tools."""
    bench.vcenter.fault(unquiesced=True)
    [warning] = bench.run(running)["warnings"]
    assert "did not quiesce the guest (tools: " in warning["detail"]


@pytest.mark.parametrize("fault", [{"unquiesced": True}, {"quiesce_task": "ApplicationQuiesceFault"}])
def test_required(bench: Bench, running: TestVM, fault: dict[str, object]) -> None:
    """If quiescing is required and fails, there is no backup and no snapshot."""
    bench.options = FAST.model_copy(update={"quiesce": "required"})
    bench.vcenter.fault(**fault)
    assert isinstance(bench.fail(running), SourceUnavailable)
    assert not bench.left()
    assert bench.run(running)["quiesced"] is True


def test_field_of_the_request(bench: Bench, running: TestVM) -> None:
    """The request's own quiesce takes precedence over the settings."""
    bench.options = FAST.model_copy(update={"quiesce": "required"})
    bench.vcenter.fault(unquiesced=True)
    assert [each["check"] for each in bench.run(running, quiesce="if_possible")["warnings"]] == ["quiescing"]
    assert bench.run(running, id="b2", quiesce="no")["warnings"] == []


def test_vm_that_is_off(bench: Bench, vm: TestVM) -> None:
    """A VM that is off needs no quiescing, so there is no warning."""
    bench.options = FAST.model_copy(update={"quiesce": "required"})
    bench.vcenter.fault(unquiesced=True)
    assert bench.run(vm)["warnings"] == []


@pytest.mark.parametrize("fault", ["NoPermission", "TaskInProgress", "NoDiskSpace", "RestrictedVersion"])
def test_not_of_the_guest(bench: Bench, running: TestVM, fault: str) -> None:
    """A fault that has nothing to do with the guest leads to no second snapshot."""
    before = bench.vcenter.state()["calls"].get("CreateSnapshotEx_Task", 0)
    bench.vcenter.fault(quiesce_task=fault)
    assert isinstance(bench.fail(running), WorkerError)
    assert bench.vcenter.state()["calls"]["CreateSnapshotEx_Task"] == before + 1


@pytest.mark.parametrize(("given", "meant"), [(True, "if_possible"), (False, "no"), ("required", "required")])
def test_older_settings(given: object, meant: str) -> None:
    """The booleans of older settings are still accepted."""
    assert BackupSection.model_validate({"quiesce": given}).quiesce == meant
