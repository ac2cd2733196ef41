"""The fixtures of every test. The fixtures of each server are in tests/servers/."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import threading
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.waiting import PATIENCE_S

# Tests have no time limits, because other processes may use the machine.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A limit for hanging tests only. The option --timeout overrides it.
os.environ.setdefault("PYTEST_TIMEOUT", str(5 * PATIENCE_S))

pytest.register_assert_rewrite("tests.contracts", "tests.backup_bench")

pytest_plugins: list[str] = [
    "tests.servers.broker",
    "tests.servers.browser",
    "tests.servers.collector",
    "tests.servers.ftp",
    "tests.servers.http",
    "tests.servers.publisher",
    "tests.servers.raw",
    "tests.servers.s3",
    "tests.servers.rclone",
    "tests.servers.s3_faults",
    "tests.servers.scripted_server",
    "tests.servers.apache",
    "tests.servers.service",
    "tests.servers.sftp",
    "tests.servers.syslog",
    "tests.servers.vcenter",
    "tests.servers.versity",
    "tests.servers.worker",
    "tests.servers.flower",
    "tests.servers.rabbitmq",
    "tests.servers.recipes",
    "tests.backup_bench",
    "tests.copies",
    "tests.migrations",
    "tests.privileges",
    "tests.uploads",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that makes the vCenter simulator behave like a real vCenter."""
    what = "run the tests of VMware against a simulator that behaves like the vCenter of this report"
    parser.addoption("--vcenter-profile", metavar="REPORT.json", help=what)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Do not look for garbage among the collected tests: they stay until the end, and there are a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def process_of_a_fresh_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of a worker from the environment, and let each test start processes by vfork.

    A fork would copy the page tables of this large process. A store on NFS forbids vfork, for good, to its process.
    """
    for name in [name for name in os.environ if name.startswith("SSVM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(subprocess, "_USE_VFORK", True)


@pytest.fixture(autouse=True)
def older_threads() -> set[threading.Thread]:
    """Return the threads that other tests of this process left. Some of them log, and each may end at any time."""
    return set(threading.enumerate()) - {threading.current_thread()}


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, older_threads: set[threading.Thread]
) -> Iterator[pytest.LogCaptureFixture]:
    """Capture only what this test and its own threads log."""

    def is_of_this_test(_: logging.LogRecord) -> bool:
        return threading.current_thread() not in older_threads

    caplog.handler.addFilter(is_of_this_test)
    yield caplog
    caplog.handler.removeFilter(is_of_this_test)
