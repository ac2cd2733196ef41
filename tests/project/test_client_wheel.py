"""The distribution ssvm-client in an empty virtual environment: it submits any job without a worker's libraries."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

from tests import images
from tests.neighbours import ROOT
from tests.project.test_wheel import must, python, uv
from tests.servers.http import HttpServer
from tests.servers.worker import Site

#: Submits a download and a backup, waits for the download, and prints what it has and what it cannot import.
PROGRAM = """
import importlib.util, json, sys
from importlib.metadata import version
from ssvm_worker.client import Client

url, prefix, image = sys.argv[1:]
with Client.connect(url, zone="z", prefix=prefix) as client:
    job = client.submit("download", url=image, account="alone", id="201")
    other = client.submit("backup", zone="nowhere", vcenter="vc", vm="vm-1", account="alone", volume="v", id="b1")
    found = [client.wait(job.job_id).state, client.cancel(other.job_id, by="test").state]
worker_only = ["boto3", "pyVmomi", "pyVim", "tqdm", "oslo_utils"]
print(json.dumps([found, version("ssvm-client"), [each for each in worker_only if importlib.util.find_spec(each)]]))
"""


def test_dependencies() -> None:
    """The client needs some of the worker's libraries, in the same versions."""
    worker, client = (tomllib.loads((ROOT / each / "pyproject.toml").read_text()) for each in (".", "client"))
    assert set(client["project"]["dependencies"]) < set(worker["project"]["dependencies"])


@pytest.mark.e2e
def test_alone(worker_site: Site, http_server: HttpServer, tmp_path: Path) -> None:
    """An installation of ssvm-client alone submits jobs and waits for their end."""
    must(uv(), "build", "--quiet", "--wheel", "--out-dir", tmp_path, ROOT / "client")
    locked = ("export", "--quiet", "--project", ROOT, "--locked", "--no-default-groups", "--no-emit-project")
    must(uv(), *locked, "--no-hashes", "--output-file", tmp_path / "locked.txt")
    must(uv(), "venv", "--quiet", "--python", python(sys.version_info.minor), tmp_path / "venv")
    program = tmp_path / "venv/bin/python"
    [wheel] = tmp_path.glob("*.whl")
    must(uv(), "pip", "install", "--quiet", "--python", program, "--constraints", tmp_path / "locked.txt", wheel)
    broker = worker_site.broker
    image = http_server.serve("image", images.mbr(1 << 20))
    states, version, others = json.loads(must(program, "-I", "-c", PROGRAM, broker.url, broker.prefix, image))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (states, version, others) == (["succeeded", "cancelled"], project["version"], [])
