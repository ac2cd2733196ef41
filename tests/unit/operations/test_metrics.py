"""Prometheus metrics are correct, and the dashboard and alert rules use only existing metrics."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.ledger.agents import AgentInfo, AgentRegistry
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.open_snapshots import OpenSnapshot
from ssvm_worker.ledger.open_snapshots.redis import SharedOpenSnapshots
from ssvm_worker.ledger.record import INBOUND, NewJob
from ssvm_worker.ledger.slots.redis import SharedSlots
from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from ssvm_worker.operations import health, metrics
from ssvm_worker.wiring import assembly
from tests.neighbours import ROOT, free_port, missing
from tests.servers.broker import Broker
from tests.waiting import PATIENCE_S, until

CONFIG = ROOT / "config"
JOB = NewJob("j1", "download", "z", "download", {"url": "http://x/y"})
WORKER = WorkerInfo("w1", socket.gethostname(), "z", ("download",), 2, "1.0", started=1.0)
STORES: list[dict[str, Any]] = [
    {"name": "primary", "state": "up", "total": 10, "used": 4, "free": 6, "latency_ms": 2.0, "breaker": "closed"},
    {"name": "archive", "state": "down", "error": "StoreUnavailable: away"},
]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def settings(broker: Broker) -> Settings:
    """Return settings of a worker in zone z."""
    return parse({"zone": "z", "broker": {"url": broker.url, "prefix": broker.prefix}}, "the test")


@pytest.fixture
def registry(broker: Broker) -> WorkerRegistry:
    """Return the registry of that broker's workers."""
    return WorkerRegistry(broker.url, prefix=broker.prefix)


@pytest.fixture
def busy(broker: Broker, registry: WorkerRegistry) -> Iterator[Ledger]:
    """Return a ledger with three jobs (running, waiting, failed), a worker, and a lease of an ESXi host."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=100) as ledger:
        for job_id in ("runs", "fails", "waits"):
            ledger.submit(replace(JOB, job_id=job_id))
        runs, fails = ledger.claim("runs", "w"), ledger.claim("fails", "w")
        assert runs
        assert fails
        ledger.beat(runs, {"bytes": 5, "moved": 5, "rate": 100})
        ledger.beat(fails, {"bytes": 0, "moved": 7, "rate": 100})
        ledger.finish(fails, "failed", error={"error": "ChecksumMismatch"})
        registry.beat(replace(WORKER, active=1))
        snapshots = SharedOpenSnapshots(broker.url, prefix=broker.prefix)
        snapshots.note(OpenSnapshot("runs", "vc1", "vm-1", time.time() - 60))
        snapshots.note(OpenSnapshot("old", "vc1", "vm-2", 0.0, needs_consolidation=True))
        agents = AgentRegistry(broker.url, prefix=broker.prefix)
        agents.hold("s-1-VM", "a", 100, AgentInfo("h", 1, "z", "1.0", host_id=4))
        agents.note(
            {("DownloadCommand", "ok", 0): 2, ("DownloadCommand", "ok", 2): 1}, {("DownloadCommand", "ok"): 1.5}
        )
        with SharedSlots(broker.url, prefix=broker.prefix).hold("esxi1", 2, lambda _: None):
            yield ledger


def samples(settings: Settings, stores: list[dict[str, Any]] = STORES) -> Samples:
    """Return every sample of a scrape."""
    found = CollectorRegistry()
    found.register(metrics.Collector(settings, lambda: stores))
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
        ("ssvm_snapshots", {"vcenter": "vc1", "state": "open"}, 1),
        ("ssvm_snapshots", {"vcenter": "vc1", "state": "consolidation"}, 1),
        ("ssvm_agent_connected", {"guid": "s-1-VM", "zone": "z"}, 1),
        ("ssvm_agent_answer_seconds_count", {"command": "DownloadCommand", "result": "ok"}, 3),
        ("ssvm_agent_answer_seconds_sum", {"command": "DownloadCommand", "result": "ok"}, 1.5),
        ("ssvm_agent_answer_seconds_bucket", {"command": "DownloadCommand", "result": "ok", "le": "0.05"}, 2),
        ("ssvm_agent_answer_seconds_bucket", {"command": "DownloadCommand", "result": "ok", "le": "5.0"}, 3),
        ("ssvm_store_up", {"store": "primary"}, 1),
        ("ssvm_store_up", {"store": "archive"}, 0),
        ("ssvm_store_breaker", {"store": "primary", "state": "closed"}, 1),
        ("ssvm_store_bytes", {"store": "primary", "kind": "free"}, 6),
        ("ssvm_store_latency_seconds", {"store": "primary"}, 0.002),
    ],
)
def test_sample(settings: Settings, name: str, labels: dict[str, str], value: float) -> None:
    """Each metric exists with its labels."""
    assert samples(settings)[name, tuple(sorted(labels.items()))] == value


@pytest.mark.usefixtures("busy")
def test_the_oldest_that_waits(settings: Settings) -> None:
    """The age of the oldest waiting job grows."""
    labels = (("lane", "download"), ("zone", "z"))
    first = samples(settings)["ssvm_queue_oldest_seconds", labels]
    assert 0 < first < samples(settings)["ssvm_queue_oldest_seconds", labels]


@pytest.mark.usefixtures("busy")
def test_age_of_the_oldest_snapshot(settings: Settings) -> None:
    """The age is that of the oldest snapshot that still exists."""
    assert 60 <= samples(settings)["ssvm_snapshot_oldest_seconds", (("vcenter", "vc1"),)] < 86400


def test_without_a_broker() -> None:
    """Without the broker, a metric reports its absence, and the stores' metrics remain."""
    found = samples(parse({"broker": {"url": f"redis://127.0.0.1:{free_port()}/0"}}, "the test"))
    assert found["ssvm_up", ()] == 0
    assert {name for name, _ in found if not name.startswith("ssvm_store")} == {"ssvm_up"}


@pytest.mark.usefixtures("busy")
def test_dashboard_and_rules(settings: Settings) -> None:
    """Every metric in the dashboard and the alerts exists."""
    known = {name for name, _ in samples(settings)}
    assert watched() <= known


def test_each_metric_is_watched() -> None:
    """Every metric is in the dashboard or in an alert, or listed here as one for other dashboards."""
    others = {"ssvm_claims", "ssvm_worker_capacity", "ssvm_agent_answer_seconds"}
    assert {name.removesuffix("_total") for name in watched()} == set(metrics.METRICS) - others


def watched() -> set[str]:
    """Return the metrics in the dashboard and in the alerts."""
    panels = json.loads((CONFIG / "grafana/ssvm.json").read_text())["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    asked += (CONFIG / "prometheus/ssvm-rules.yml").read_text()
    return set(re.findall(r"\bssvm_[a-z_]+\b", asked))


def test_rules_are_valid() -> None:
    """promtool accepts the rules and the scrape configuration."""
    if not (promtool := shutil.which("promtool")):
        missing("promtool", "install Debian's prometheus")
    subprocess.run([promtool, "check", "config", str(CONFIG / "prometheus/prometheus.yml")], check=True)


#: The alerts that fire in each situation, and no others, after 40 minutes. One minute of promtool is one sample.
SITUATIONS: dict[str, tuple[str, set[str]]] = {
    "stopped": (
        "jobs wait, and the last worker was stopped in good order",
        {"SsvmNoWorker", "SsvmTooFewWorkers", "SsvmQueueWaits"},
    ),
    "killed": ("the only worker was killed", {"SsvmNoWorker", "SsvmTooFewWorkers", "SsvmWorkerDown"}),
    "idle": ("a worker is up, and nothing waits", set()),
    "upload": ("an upload waits for its sender", set()),
    "over": ("all jobs of a zone have ended, and it has no worker", set()),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_alerts(settings: Settings, broker: Broker, registry: WorkerRegistry, tmp_path: Path, situation: str) -> None:
    """The metrics of each situation fire exactly the alerts of that situation."""
    own = WORKER if situation == "killed" else replace(WORKER, every_s=1e9)
    if situation != "stopped":
        registry.beat(replace(own, capacity=8))
    if situation == "stopped":
        registry.beat(WORKER)
        registry.leave(WORKER.name)
    if situation == "killed":
        shift(broker, registry, 3600)
    settings = settings.model_copy(
        update={"scaling": settings.scaling.model_copy(update={"standby": 0, "sessions": 8})}
    )
    with Ledger(broker.url, prefix=broker.prefix) as ledger:
        if situation == "stopped":
            ledger.submit(JOB)
        if situation == "upload":
            ledger.submit(replace(JOB, lane=INBOUND))
        if situation == "over":
            ledger.submit(replace(JOB, zone="typo"))
            ledger.cancel(JOB.job_id, "the test")
    _, expected = SITUATIONS[situation]
    check_alerts(samples(settings, STORES[:1]), expected, tmp_path)


def shift(broker: Broker, registry: WorkerRegistry, seconds: float) -> None:
    """Set the last heartbeat of all workers to so long ago."""
    registry._redis.zincrby(f"{broker.prefix}ssvm.workers:seen", -seconds, WORKER.name)
    assert [each.state for each in registry.workers()] == ["Down"]


def check_alerts(found: Samples, expected: set[str], directory: Path, minutes: int = 41) -> None:
    """Run promtool with these samples for so long, and check that exactly the expected alerts fire at the end."""
    rules = CONFIG / "prometheus/ssvm-rules.yml"
    series = [
        {"series": f"{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in labels)}}}",
         "values": moving(name, value)}
        for (name, labels), value in found.items()
    ]  # fmt: skip
    names = [each["alert"] for each in yaml.safe_load(rules.read_text())["groups"][0]["rules"]]
    checks = [
        {"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})', "eval_time": f"{minutes}m",
         "exp_samples": [{"labels": "{}", "value": 1}] if name in expected else []}
        for name in names
    ]  # fmt: skip
    run_promtool({"interval": "1m", "input_series": series, "promql_expr_test": checks}, directory)


def run_promtool(test: dict[str, Any], directory: Path) -> None:
    """Let promtool run a test of our rules."""
    if not (promtool := shutil.which("promtool")):
        missing("promtool", "install Debian's prometheus")
    rules = CONFIG / "prometheus/ssvm-rules.yml"
    file = directory / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def moving(name: str, value: float) -> str:
    """Return the samples of a series over an hour: ages and timestamps grow, all others are constant."""
    if name == "ssvm_queue_oldest_seconds" and value:
        return f"{value}+60x60"
    return f"{0 if name.endswith('timestamp_seconds') else value}+{60 if name.endswith('timestamp_seconds') else 0}x60"


@pytest.mark.parametrize(
    ("name", "labels", "values", "alert"),
    [
        ("ssvm_up", {}, "0x60", "SsvmBrokerAway"),
        ("ssvm_agent_connected", {"guid": "s-1-VM", "zone": "z"}, "0x60", "SsvmAgentDisconnected"),
        ("ssvm_store_up", {"store": "a"}, "0x60", "SsvmStoreDown"),
        ("ssvm_store_breaker", {"store": "a", "state": "open"}, "1x60", "SsvmStoreBreakerOpen"),
        ("ssvm_stores_examined_timestamp_seconds", {}, "0x60", "SsvmStoresNotExamined"),
        ("ssvm_callbacks_pending", {}, "3x120", "SsvmCallbacksFail"),
        ("ssvm_snapshot_oldest_seconds", {"vcenter": "vc1"}, "85800+60x60", "SsvmSnapshotOld"),
        ("ssvm_snapshots", {"vcenter": "vc1", "state": "consolidation"}, "1x60", "SsvmConsolidationNeeded"),
    ],
)
def test_alerts_of_one_figure(tmp_path: Path, name: str, labels: dict[str, str], values: str, alert: str) -> None:
    """A metric that stays wrong fires its alert."""
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    end = "100m" if "120" in values else "41m"
    check = {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": end,
             "exp_samples": [{"labels": "{}", "value": 1}]}  # fmt: skip
    test = {
        "interval": "1m",
        "input_series": [{"series": f"{name}{{{text}}}", "values": values}],
        "promql_expr_test": [check],
    }
    run_promtool(test, tmp_path)


def test_many_failed_jobs(tmp_path: Path) -> None:
    """More than five failures in 30 minutes fire an alert, also with a new class, but older ones do not."""
    # The exporter starts after ten minutes. The failures of "Old" are from long before.
    series = {
        "New": "_x60 4x4 6x95", "Known": "_x10 10x50 16x99", "Few": "_x10 10x50 15x99", "NewFew": "_x60 5x99",
        "Old": "_x10 50x149",
    }  # fmt: skip
    expected = {"35m": [], "62m": ["Known"], "70m": ["Known", "New"], "120m": []}
    run_failures(tmp_path, "SsvmJobsFail", "_x10 1x149", series, expected)


def test_one_failed_job(tmp_path: Path) -> None:
    """One failed job fires an alert for an hour, also the first of its class, but not an older one."""
    series = {"StoreFull": "3x20 4x180", "ChecksumMismatch": "_x80 1x120", "SourceDenied": "5x200"}
    expected = {"10m": [], "40m": ["StoreFull"], "100m": ["ChecksumMismatch"], "190m": []}
    run_failures(tmp_path, "SsvmJobFailed", "1x200", series, expected)


def run_failures(
    tmp_path: Path, alert: str, up: str, series: Mapping[str, str], expected: Mapping[str, Sequence[str]]
) -> None:
    """Check when an alert fires. *series* has the number of failed jobs for each class, and *expected* the classes."""
    labels = 'state="failed",job="download",lane="download",zone="z"'
    firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
    test = {
        "interval": "1m",
        "input_series": [
            {"series": "ssvm_up", "values": up},
            *({"series": f'ssvm_jobs_ended_total{{error="{error}",{labels}}}', "values": values}
              for error, values in series.items()),
        ],
        "promql_expr_test": [
            {"expr": f"count by (error) ({firing})", "eval_time": at,
             "exp_samples": [{"labels": f'{{error="{error}"}}', "value": 1} for error in errors]}
            for at, errors in expected.items()
        ],
    }  # fmt: skip
    run_promtool(test, tmp_path)


def test_all_that_run(settings: Settings, broker: Broker) -> None:
    """Every running job counts, at any number of jobs."""
    with Ledger(broker.url, prefix=broker.prefix, claim_s=1000) as ledger:
        for number in range(1010):
            ledger.submit(replace(JOB, job_id=f"j{number}"))
            assert ledger.claim(f"j{number}", "w")
    assert samples(settings)["ssvm_claims", (("job", "download"), ("zone", "z"))] == 1010


def test_a_scrape_opens_no_connection(settings: Settings) -> None:
    """Repeated scrapes reuse the exporter's connections."""
    collector = metrics.Collector(settings, list)
    list(collector.collect())
    client = assembly.open_links(settings)._redis  # the connection that counts
    before = client.info("stats")["total_connections_received"]
    for _ in range(5):
        list(collector.collect())
    assert client.info("stats")["total_connections_received"] == before


def test_stores_that_cannot_be_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no process can start, the watch continues, and shows only when it last examined the stores."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StoreUnavailable, match="cannot be examined"):
        health.look_at_stores(None)
    watch = health.StoreWatch(None)
    [thread] = [each for each in threading.enumerate() if each.name == "stores" and each.is_alive()][-1:]
    thread.join(0.5)  # long enough for one round; on a slower machine the thread is alive anyway
    assert (thread.is_alive(), watch.rows(), watch.looked) == (True, [], 0.0)


def test_every_alert_has_its_line() -> None:
    """Every alert has a line in the documentation that says what to do."""
    rules = (CONFIG / "prometheus/ssvm-rules.yml").read_text()
    assert rules.count("- alert:") == rules.count("runbook:") > 5


@pytest.fixture
def address(settings: Settings) -> Iterator[str]:
    """Return the exporter's address over HTTP."""
    server = metrics.server(settings, None, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str) -> tuple[int, str]:
    """Return status and text."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_over_http(address: str, registry: WorkerRegistry) -> None:
    """/metrics has all metrics, /livez answers, and /readyz says why no job would be accepted."""
    assert get(f"{address}/livez") == (200, "ok\n")
    status, why = get(f"{address}/readyz")
    assert (status, "there is none" in why) == (503, True)
    registry.beat(WORKER)
    assert get(f"{address}/readyz") == (200, "ok\n")
    assert "ssvm_up 1.0" in get(f"{address}/metrics")[1]
    assert get(f"{address}/else")[0] == 404


def test_probes(settings: Settings, registry: WorkerRegistry) -> None:
    """A host's worker is live while it sends heartbeats; a draining worker is live but not ready."""
    host = WORKER.host
    assert "No worker" in health.dead(settings, host)
    registry.beat(replace(WORKER, draining=True))
    assert health.dead(settings, host) == ""
    assert "Draining" in health.unready(settings, host)
    registry.beat(WORKER)
    assert health.unready(settings, host) == ""
    assert "there is none" in health.unready(settings, "another")


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=odd", "*/*", "\x80;q=x"])
def test_odd_accept(address: str, accept: str) -> None:
    """A scrape succeeds with any Accept header."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as peer:
        peer.sendall(f"GET /metrics?name[]=%ff&x HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode("latin-1"))
        with peer.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"200"


def test_silent_connections(address: str) -> None:
    """Many silent connections hold no thread each, and do not block Prometheus."""
    host, port = address.removeprefix("http://").split(":")
    peers = [socket.create_connection((host, int(port))) for _ in range(200)]
    assert get(f"{address}/livez") == (200, "ok\n")
    until(lambda: len([each for each in threading.enumerate() if "process_request" in each.name]) <= 32, "they end")
    for peer in peers:
        peer.close()
