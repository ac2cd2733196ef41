"""`ssvm flower` starts Flower with our pages, and only with a login."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ssvm_worker.cli import main
from tests.neighbours import free_port
from tests.servers.broker import Broker
from tests.waiting import PATIENCE_S, until


def test_needs_a_login(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a login, Flower does not start, and the error says how to give one."""
    for name in ("FLOWER_BASIC_AUTH", "FLOWER_BASIC_AUTH_FILE", "FLOWER_AUTH"):
        monkeypatch.delenv(name, raising=False)

    assert main(["flower"]) == 2
    assert "--login-file" in capsys.readouterr().err


def test_starts(broker: Broker, tmp_path: Path) -> None:
    """Flower answers with our page of jobs below the prefix, and refuses a request without the login."""
    (tmp_path / "login").write_text("me:secret")
    port = free_port()
    environ = os.environ | {"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix}
    argv = ["flower", "--login-file", str(tmp_path / "login"), "--port", str(port), "--url-prefix", "flower"]
    flower = subprocess.Popen([sys.executable, "-m", "ssvm_worker", *argv], env=environ, cwd=tmp_path)
    try:
        until(lambda: status(port, "wrong") == 401, "Flower refuses a wrong login")
        assert status(port, "secret") == 200
    finally:
        flower.terminate()
        flower.wait(PATIENCE_S)


def status(port: int, password: str) -> int:
    """Return the HTTP status of the page of jobs, or 0 if nothing listens."""
    manager = urllib.request.HTTPPasswordMgrWithPriorAuth()
    url = f"http://127.0.0.1:{port}/flower/jobs"
    manager.add_password(None, url, "me", password, is_authenticated=True)
    try:
        return int(urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager)).open(url).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
