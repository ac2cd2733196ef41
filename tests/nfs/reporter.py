"""The VM's side of the reports: each is one line of a file, written at once, with the kernel's log for failures."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.contracts", "tests.backup_bench")

_LINES = 40


class Reporter:
    """A plug-in that writes to the file that the host reads."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - it is open until the VM ends

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write one line."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add the kernel's log, the mounts, the connections and the waiting processes to a failure."""
        report = yield
        if report.failed:
            report.sections.append(("the VM's kernel", _tail("dmesg")))
            report.sections.append(("mounts of alpha", _tail("cat", "/proc/self/mountinfo")))
            report.sections.append(("connections of alpha to the NFS server", _tail("ss", "-tnio", "dport = :2049")))
            report.sections.append(("kernel stacks of the threads", "\n".join(_stacks())))
        return report


def pytest_configure(config: pytest.Config) -> None:
    """Start the reporter."""
    config.pluginmanager.register(Reporter(config, os.environ["NFS_VM"]))


def _tail(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "\n".join(said.splitlines()[-_LINES:])


def _stacks() -> Iterator[str]:
    """Yield command, state and kernel stack of every thread that does not sleep in a usual place."""
    for thread in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with contextlib.suppress(OSError):
            command = (thread / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
            stack = (thread / "stack").read_text()
            state = (thread / "status").read_text().partition("State:")[2].split()[0]
            if command and (state == "D" or "nfs" in stack or "rpc" in stack):
                yield f"{thread} {state} {command}\n{stack}"
