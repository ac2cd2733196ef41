"""The fixtures of every test; each neighbour's own are in tests/servers/."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.contracts", "tests.backup_bench")

pytest_plugins: list[str] = [
    "tests.servers.broker",
    "tests.servers.http",
    "tests.servers.s3",
    "tests.servers.s3_faults",
    "tests.servers.vcenter",
    "tests.servers.worker",
    "tests.backup_bench",
]
