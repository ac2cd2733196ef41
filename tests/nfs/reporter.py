"""The VM's side of the reports: each a line of a file as soon as there is one, with the kernel's word on failures."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator

import pytest

pytest.register_assert_rewrite("tests.contracts", "tests.backup_bench")

_LINES = 40


class Reporter:
    """Writes to the file that the host follows."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - it is open until the VM ends

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What the kernel and the mounts say belongs to a failure."""
        report = yield
        if report.failed:
            report.sections.append(("the VM's kernel", _tail("dmesg")))
            report.sections.append(("mounts of alpha", _tail("cat", "/proc/self/mountinfo")))
        return report


def pytest_configure(config: pytest.Config) -> None:
    """Begin."""
    config.pluginmanager.register(Reporter(config, os.environ["NFS_VM"]))


def _tail(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "\n".join(said.splitlines()[-_LINES:])
