"""The fixtures of every test; each neighbour's own are in tests/servers/."""

from __future__ import annotations

pytest_plugins: list[str] = ["tests.servers.http", "tests.servers.broker", "tests.servers.worker", "tests.servers.s3", "tests.servers.s3_faults", "tests.servers.vcenter", "tests.backup_bench"]
