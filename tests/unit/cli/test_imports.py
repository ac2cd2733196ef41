"""Each command imports only the libraries that it needs, so that it starts quickly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ssvm_worker.cli import _GROUPS, make_parser
from tests.servers.broker import Broker
from tests.servers.http import HttpServer

#: The libraries whose import takes more than 20 ms.
_LIBRARIES = (
    "asyncio",
    "boto3",
    "celery",
    "opentelemetry.sdk.metrics",
    "oslo_utils.strutils",
    "pydantic",
    "pyVmomi",
    "redis",
    "requests",
    "tqdm",
)
_PROGRAM = """
import atexit, gc, sys
atexit.register(lambda: gc.get_freeze_count() or print("not frozen", file=sys.stderr))
from ssvm_worker.cli import main
try:
    status = main(sys.argv[2:])
except SystemExit as stop:
    status = stop.code
print(status, *(name for name in sys.argv[1].split(",") if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("--version",), ""),
        (("--help",), "pydantic"),
        (("jobs",), "asyncio pydantic redis"),  # redis imports asyncio
        (("job", "no-such-job"), "asyncio pydantic redis"),
        (("config",), "pydantic"),
        (("schema",), "pydantic"),  # reads the requests of all jobs, as a list of jobs does
        (("list",), "pydantic"),
        (("stores",), "pydantic"),
        (("run", "delete", "--account", "a", "--id", "i", "--stores", "primary"), "pydantic"),
        (("run", "verify", "--account", "a", "--id", "i", "--store", "primary"), "pydantic"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_libraries(broker: Broker, tmp_path: Path, command: tuple[str, ...], expected: str) -> None:
    """A command imports exactly these of the slow libraries."""
    (tmp_path / "store").mkdir()
    config = tmp_path / "worker.toml"
    url = broker.url if "redis" in expected else "redis://127.0.0.1:1/0"  # no server listens on port 1
    broker_lines = f'[broker]\nurl = "{url}"\nprefix = "{broker.prefix}"\n'
    config.write_text(f'{broker_lines}[stores.primary]\nurl = "file://{tmp_path}/store"\n')
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, ",".join(_LIBRARIES), *command],
        env={"SSVM_CONFIG": str(config), "SSVM_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1].split()[1:] == expected.split(), done.stderr


def test_download(http_server: HttpServer, tmp_path: Path) -> None:
    """A download over HTTP, which also inspects the image, imports only what it needs of the slow libraries."""
    (tmp_path / "store").mkdir()
    config = tmp_path / "worker.toml"
    lines = f'[stores.primary]\nurl = "file://{tmp_path}/store"\n[download]\nallow_networks = ["127.0.0.0/8"]\n'
    config.write_text(lines)
    url = http_server.serve("image.raw", bytes(1 << 20))
    fields = ("--url", url, "--account", "a", "--id", "i")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, ",".join(_LIBRARIES), "run", "download", *fields],
        env={"SSVM_CONFIG": str(config), "SSVM_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "0 pydantic requests", done.stderr


def test_each_command_has_its_group() -> None:
    """The table of commands names exactly the commands that each module adds."""
    for group, commands in _GROUPS.items():
        actions = [each for each in make_parser((group,))._actions if each.dest == "command" or each.choices]
        assert tuple(actions[-1].choices or ()) == commands, group
