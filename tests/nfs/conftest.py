"""The tests of this directory run inside a small VM; outside, each gets pytest's report from the VM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.neighbours import missing
from tests.nfs.server import Server
from tests.nfs.vm import VM, lacking

HERE = Path(__file__).resolve().parent
IN_VM = "NFS_VM" in os.environ
THE_VM = pytest.StashKey[VM]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests before marks select any."""
    for item in _ours(items):
        item.add_marker(pytest.mark.nfs)
        if not IN_VM:
            item.add_marker(pytest.mark.timeout(0))  # the VM has its own limits


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Outside the VM, report the VM's result of the test, and do not run it."""
    if IN_VM or not _ours([item]):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _ours(items: list[pytest.Item]) -> list[pytest.Item]:
    return [each for each in items if each.path.parent == HERE]


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    if (lack := lacking()) is not None:
        return [_ended_by(item, lambda: missing(*lack))]
    vm = _vm(item.session)
    if (told := vm.reports(item.nodeid)) is None:
        text = f"The VM ended before this case did.\n{vm.last_words()}"
        return [_ended_by(item, lambda: pytest.fail(text, pytrace=False))]
    return [item.config.hook.pytest_report_from_serializable(config=item.config, data=each) for each in told]


def _vm(session: pytest.Session) -> VM:
    """Return the VM of this run with all its cases, which share one boot."""
    if THE_VM not in session.stash:
        session.stash[THE_VM] = VM([each.nodeid for each in _ours(session.items)])
        session.config.add_cleanup(session.stash[THE_VM].close)
    return session.stash[THE_VM]


def _ended_by(item: pytest.Item, outcome: Callable[[], None]) -> pytest.TestReport:
    call = pytest.CallInfo.from_call(outcome, "setup")
    report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    return report


@pytest.fixture(scope="session")
def running_server() -> Iterator[Server]:
    """Return the VM's NFS server."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """Return the VM's NFS server, and restore it after each test."""
    yield running_server
    running_server.heal()
