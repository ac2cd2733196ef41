"""What Prometheus gets: the figures are right, and the dashboard and the rules ask for nothing that is not there."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ssvm_worker import health, metrics
from ssvm_worker.config import parse
from ssvm_worker.ledger import Ledger, NewJob
from ssvm_worker.ledger.registry import Registry, WorkerInfo
from ssvm_worker.ledger.slots import SharedSlots
from ssvm_worker.settings import Settings
from tests.neighbours import free_port, missing
from tests.servers.broker import Broker
from tests.waiting import PATIENCE_S

CONFIG = Path(__file__).resolve().parent.parent / "config"
JOB = NewJob("j1", "download", "z", "download", {"url": "http://x/y"})
WORKER = WorkerInfo("w1", socket.gethostname(), "z", ("download",), 2, "1.0", started=1.0)
STORES: list[dict[str, Any]] = [
    {"name": "primary", "state": "up", "total": 10, "used": 4, "free": 6, "latency_ms": 2.0, "breaker": "closed"},
    {"name": "archive", "state": "down", "error": "StoreUnavailable: away"},
]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def settings(broker: Broker) -> Settings:
    """Settings of a worker in zone z."""
    return parse({"zone": "z", "broker": {"url": broker.url, "prefix": broker.prefix}}, "the test")


@pytest.fixture
def registry(broker: Broker) -> Registry:
    """The workers of that broker."""
    return Registry(broker.url, prefix=broker.prefix)


@pytest.fixture
def busy(broker: Broker, registry: Registry) -> Iterator[Ledger]:
    """A job that runs, one that waits, one that has failed, a worker, and a lease of an ESXi host."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=100) as ledger:
        for job_id in ("runs", "fails", "waits"):
            ledger.submit(replace(JOB, job_id=job_id))
        runs, fails = ledger.claim("runs", "w"), ledger.claim("fails", "w")
        assert runs
        assert fails
        ledger.beat(runs, {"bytes": 5, "rate": 100})
        ledger.beat(fails, {"bytes": 7, "rate": 100})
        ledger.finish(fails, "failed", error={"error": "ChecksumMismatch"})
        registry.beat(replace(WORKER, active=1))
        with SharedSlots(broker.url, prefix=broker.prefix).hold("esxi1", 2, lambda _: None):
            yield ledger


def samples(settings: Settings) -> Samples:
    """Every sample that is scraped."""
    found = CollectorRegistry()
    found.register(metrics.Collector(settings, lambda: STORES))
    families = text_string_to_metric_families(generate_latest(found).decode())
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for one in families for each in one.samples}


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("ssvm_up", {}, 1),
        ("ssvm_jobs", {"state": "running", "lane": "download", "zone": "z"}, 1),
        ("ssvm_jobs", {"state": "queued", "lane": "download", "zone": "z"}, 1),
        (
            "ssvm_jobs_ended_total",
            {"job": "download", "lane": "download", "zone": "z", "state": "failed", "error": "ChecksumMismatch"},
            1,
        ),
        ("ssvm_bytes_total", {"job": "download", "zone": "z"}, 7),
        ("ssvm_claims", {"job": "download", "zone": "z"}, 1),
        ("ssvm_rate_bytes_per_second", {"job": "download", "zone": "z"}, 100),
        ("ssvm_workers", {"zone": "z", "state": "Up"}, 1),
        ("ssvm_workers", {"zone": "z", "state": "Down"}, 0),
        ("ssvm_worker_capacity", {"zone": "z"}, 2),
        ("ssvm_workers_desired", {"zone": "z"}, 2),
        ("ssvm_slots_held", {"limit": "esxi1"}, 1),
        ("ssvm_store_up", {"store": "primary"}, 1),
        ("ssvm_store_up", {"store": "archive"}, 0),
        ("ssvm_store_breaker", {"store": "primary", "state": "closed"}, 1),
        ("ssvm_store_bytes", {"store": "primary", "kind": "free"}, 6),
        ("ssvm_store_latency_seconds", {"store": "primary"}, 0.002),
    ],
)
def test_sample(settings: Settings, name: str, labels: dict[str, str], value: float) -> None:
    """Each figure is there with its labels."""
    assert samples(settings)[name, tuple(sorted(labels.items()))] == value


@pytest.mark.usefixtures("busy")
def test_the_oldest_that_waits(settings: Settings) -> None:
    """How long the oldest job has waited grows."""
    labels = (("lane", "download"), ("zone", "z"))
    first = samples(settings)["ssvm_queue_oldest_seconds", labels]
    assert 0 < first < samples(settings)["ssvm_queue_oldest_seconds", labels]


def test_without_a_broker() -> None:
    """While the broker is away there is one figure that says so, and the stores' own."""
    found = samples(parse({"broker": {"url": f"redis://127.0.0.1:{free_port()}/0"}}, "the test"))
    assert found["ssvm_up", ()] == 0
    assert {name for name, _ in found if not name.startswith("ssvm_store")} == {"ssvm_up"}


@pytest.mark.usefixtures("busy")
def test_dashboard_and_rules(settings: Settings) -> None:
    """Every metric that the dashboard and the alerts ask for is one that we have."""
    known = {name for name, _ in samples(settings)}
    panels = json.loads((CONFIG / "grafana/ssvm.json").read_text())["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    asked += (CONFIG / "prometheus/ssvm-rules.yml").read_text()
    assert set(re.findall(r"\bssvm_[a-z_]+\b", asked)) <= known


def test_rules_are_valid() -> None:
    """promtool takes the rules and the scrape configuration."""
    if not (promtool := shutil.which("promtool")):
        missing("promtool", "install Debian's prometheus")
    subprocess.run([promtool, "check", "config", str(CONFIG / "prometheus/prometheus.yml")], check=True)


def test_every_alert_has_its_line() -> None:
    """An alert without a line on what to do is only noise."""
    rules = (CONFIG / "prometheus/ssvm-rules.yml").read_text()
    assert rules.count("- alert:") == rules.count("runbook:") > 5


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    """The exporter over HTTP."""
    server = metrics.server(settings, None, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str) -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_over_http(address: str, registry: Registry) -> None:
    """/metrics has them all; /livez answers; /readyz says why no job would be taken."""
    assert get(f"{address}/livez") == (200, "ok\n")
    status, why = get(f"{address}/readyz")
    assert (status, "there is none" in why) == (503, True)
    registry.beat(WORKER)
    assert get(f"{address}/readyz") == (200, "ok\n")
    assert "ssvm_up 1.0" in get(f"{address}/metrics")[1]
    assert get(f"{address}/else")[0] == 404


def test_probes(settings: Settings, registry: Registry) -> None:
    """A host's worker lives while it says so; one that drains lives, but is not ready."""
    host = WORKER.host
    assert "No worker" in health.dead(settings, host)
    registry.beat(replace(WORKER, draining=True))
    assert health.dead(settings, host) == ""
    assert "Draining" in health.unready(settings, host)
    registry.beat(WORKER)
    assert health.unready(settings, host) == ""
    assert "there is none" in health.unready(settings, "another")
