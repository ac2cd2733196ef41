"""Metrics for Prometheus: the ledger, workers, stores and shared slots. The adapter of its client library.

ssvm metrics                          once, to standard output
ssvm metrics --listen 127.0.0.1:9808  /metrics, /livez and /readyz, until SIGTERM
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import StoreUnavailable, WorkerError, extra_missing
from ssvm_worker.ledger.agents import BUCKETS
from ssvm_worker.ledger.workers import DOWN, DRAINING, UP
from ssvm_worker.net.listener import Listener
from ssvm_worker.wiring import assembly

from .health import StoreWatch, look_at_stores, unready
from .scaling import decide_all

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError as error:
    raise extra_missing("prometheus_client is not installed", "ssvm metrics", "metrics") from error


#: The largest number of connections to the exporter. Prometheus and probes need a few.
_CONNECTIONS = 32


@dataclass(frozen=True)
class MetricType:
    """One metric: its name, meaning and labels. A counter's samples have the name with ``_total``."""

    name: str
    text: str
    labels: Sequence[str] = ()
    kind: str = "gauge"


#: All metrics, in the order of the output.
METRICS = {
    each.name: each
    for each in (
        MetricType("ssvm_up", "Whether the broker answers. If it is 0, only metrics of stores follow"),
        MetricType(
            "ssvm_jobs", "Jobs in the ledger. Jobs within another job have the lane held", ("state", "lane", "zone")
        ),
        MetricType("ssvm_queue_oldest_seconds", "Age of the oldest queued job", ("lane", "zone")),
        MetricType("ssvm_callbacks_pending", "Callbacks to deliver"),
        MetricType(
            "ssvm_jobs_ended",
            "Jobs that have ended. The label error is the class of the error, or -",
            ("job", "lane", "zone", "state", "error"),
            "counter",
        ),
        MetricType("ssvm_bytes", "Bytes that ended attempts have moved", ("job", "zone"), "counter"),
        MetricType("ssvm_claims", "Jobs that workers hold", ("job", "zone")),
        MetricType("ssvm_rate_bytes_per_second", "Bytes a second of all running jobs", ("job", "zone")),
        MetricType("ssvm_workers", "Workers by state: Up, Draining, Down", ("zone", "state")),
        MetricType("ssvm_worker_capacity", "Places for jobs of all workers that are up", ("zone",)),
        MetricType("ssvm_workers_desired", "Number of workers that the zone needs", ("zone",)),
        MetricType("ssvm_slots_held", "Held slots of a shared limit, such as leases of an ESXi host", ("limit",)),
        MetricType(
            "ssvm_snapshots",
            "VMs with a snapshot of a backup job, or that need consolidation after its removal. "
            "States: open, consolidation",
            ("vcenter", "state"),
        ),
        MetricType("ssvm_snapshot_oldest_seconds", "Age of the oldest snapshot of a backup job", ("vcenter",)),
        MetricType("ssvm_agent_connected", "Whether the host of an `ssvm agent` is Up at its server", ("guid", "zone")),
        MetricType(
            "ssvm_agent_answer_seconds",
            "Time from a command of a management server to the answer. Results: ok, failed",
            ("command", "result"),
            "histogram",
        ),
        MetricType("ssvm_store_up", "Whether the image store answers", ("store",)),
        MetricType("ssvm_store_breaker", "State of the circuit breaker: closed, open, half-open", ("store", "state")),
        MetricType("ssvm_store_bytes", "Bytes of the image store: total, used, free", ("store", "kind")),
        MetricType("ssvm_store_latency_seconds", "Duration of the last examination of the store", ("store",)),
        MetricType("ssvm_stores_examined_timestamp_seconds", "When the image stores were examined last"),
    )
}


class Collector:
    """Reads the broker at each scrape. While the broker is away, only ``ssvm_up`` (0) and the stores are reported."""

    def __init__(
        self, settings: Settings, stores: Callable[[], list[dict[str, Any]]], looked: Callable[[], float] = time.time
    ) -> None:
        """*stores* returns the rows of ``ssvm stores --json``, and *looked* their time; 0 means never."""
        self._settings = settings
        self._stores, self._looked = stores, looked
        self._ledger = assembly.open_ledger(settings)
        self._counters = assembly.open_job_metrics(settings)
        self._registry = assembly.open_registry(settings)
        self._agents = assembly.open_agents(settings)
        self._services = assembly.open_services(settings)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        try:
            found = [*self._jobs(), *self._running(), *self._snapshots(), *self._workers(), *self._answers()]
        except WorkerError:
            found = []
        yield _metric("ssvm_up", [([], bool(found))])
        yield from found
        yield from _store_metrics(self._stores())
        yield _metric("ssvm_stores_examined_timestamp_seconds", [([], self._looked())])

    def _jobs(self) -> Iterator[Metric]:
        lanes = self._counters.lanes()
        counts = [([s, each.lane, each.zone], n) for each in lanes for s, n in each.counts.items()]
        yield _metric("ssvm_jobs", counts)
        oldest = [([each.lane, each.zone], each.oldest_s) for each in lanes]
        yield _metric("ssvm_queue_oldest_seconds", oldest)
        yield _metric("ssvm_callbacks_pending", [([], self._counters.callbacks())])
        yield _metric("ssvm_jobs_ended", self._counters.endings().items())
        yield _metric("ssvm_bytes", self._counters.moved().items())

    def _running(self) -> Iterator[Metric]:
        claims: Counter[tuple[str, str]] = Counter()
        rates: Counter[tuple[str, str]] = Counter()
        running = sum(each.counts.get("running", 0) for each in self._counters.lanes())
        for record in self._ledger.page(state="running", limit=max(running, 1)):
            claims[record.job, record.zone] += 1
            rates[record.job, record.zone] += int((record.progress or {}).get("rate") or 0)
        yield _metric("ssvm_claims", claims.items())
        yield _metric("ssvm_rate_bytes_per_second", rates.items())
        yield _metric("ssvm_slots_held", [([name], count) for name, count in self._counters.slots().items()])

    def _snapshots(self) -> Iterator[Metric]:
        found = self._services.open_snapshots.all()
        names = dict.fromkeys([*self._settings.vcenters, *(each.vcenter for each in found)])
        counts = Counter((each.vcenter, "consolidation" if each.needs_consolidation else "open") for each in found)
        shown = [([name, state], counts[name, state]) for name in names for state in ("open", "consolidation")]
        yield _metric("ssvm_snapshots", shown)
        ages = {name: 0.0 for name in names}
        for each in found:
            if not each.needs_consolidation:
                ages[each.vcenter] = max(ages[each.vcenter], time.time() - each.created)
        yield _metric("ssvm_snapshot_oldest_seconds", [([name], age) for name, age in ages.items()])

    def _workers(self) -> Iterator[Metric]:
        seen = self._registry.workers()
        wanted = decide_all(self._settings, self._counters, self._registry)
        states: Counter[tuple[str, str]] = Counter((each.info.zone, each.state) for each in seen)
        capacity: Counter[tuple[str, ...]] = Counter()
        # A worker that ends regularly leaves no entry, so the jobs name its zone. An alert needs the value 0, because
        # it cannot see an absent metric.
        for zone in {each.zone for each in wanted} | {each.info.zone for each in seen}:
            capacity[zone,] += 0
            for state in (UP, DRAINING, DOWN):
                states[zone, state] += 0
        yield _metric("ssvm_workers", states.items())
        for each in seen:
            capacity[each.info.zone,] += each.info.capacity if each.state == UP else 0
        yield _metric("ssvm_worker_capacity", capacity.items())
        desired = [([each.zone], each.desired) for each in wanted]
        yield _metric("ssvm_workers_desired", desired)

    def _answers(self) -> Iterator[Metric]:
        connected = [([each.guid, each.info.zone], each.connected) for each in self._agents.agents()]
        yield _metric("ssvm_agent_connected", connected)
        wanted = METRICS["ssvm_agent_answer_seconds"]
        family = HistogramMetricFamily(wanted.name, wanted.text, labels=wanted.labels)
        for each in self._agents.answers():
            limits = [*map(str, BUCKETS), "+Inf"]
            buckets = list(zip(limits, accumulate(each.buckets), strict=True))
            family.add_metric([each.command, each.result], buckets, each.seconds)
        yield family


def _store_metrics(rows: list[dict[str, Any]]) -> Iterator[Metric]:
    up = [([row["name"]], row["state"] == "up") for row in rows]
    yield _metric("ssvm_store_up", up)
    breakers = [([row["name"], row["breaker"]], 1.0) for row in rows if "breaker" in row]
    yield _metric("ssvm_store_breaker", breakers)
    sizes = [
        ([row["name"], kind], row[kind])
        for row in rows
        for kind in ("total", "used", "free")
        if row.get(kind) is not None
    ]
    yield _metric("ssvm_store_bytes", sizes)
    latency = [([row["name"]], row["latency_ms"] / 1000) for row in rows if "latency_ms" in row]
    yield _metric("ssvm_store_latency_seconds", latency)


Values = Iterable[tuple[Iterable[str], float]]


def _metric(name: str, values: Values) -> Metric:
    metric = METRICS[name]
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
        name, metric.text, labels=metric.labels
    )
    for key, value in values:
        family.add_metric(list(key), value)
    return family


def text(settings: Settings, settings_file: str | None) -> str:
    """Return all metrics once, in Prometheus' text format."""
    try:
        # Without stores, for example on a host that only watches, no process has to start.
        rows, looked = look_at_stores(settings_file) if settings.stores else [], time.time()
    except StoreUnavailable:
        rows, looked = [], 0.0
    registry = CollectorRegistry()
    registry.register(Collector(settings, lambda: rows, lambda: looked))
    return generate_latest(registry).decode()


class Exporter(ThreadingMixIn, WSGIServer):
    """An HTTP server with a thread for each connection. The listener limits their number."""

    daemon_threads = True
    #: The length of the kernel's queue of connections.
    request_queue_size = 64

    def server_bind(self) -> None:
        """Bind the socket, and limit its connections."""
        super().server_bind()
        self.socket: Listener = Listener(self.socket, _CONNECTIONS, _CONNECTIONS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log errors, except those of clients that leave or stall."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(WSGIRequestHandler):
    #: Seconds that a read or a write may wait.
    timeout = 10

    def parse_request(self) -> bool:
        """Read the headers. From then on a new connection does not close this one."""
        found = super().parse_request()
        server = self.server
        assert isinstance(server, Exporter)
        server.socket.place(self.connection.fileno()).kept = found
        return found

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because a scrape happens every few seconds."""


def server(settings: Settings, settings_file: str | None, host: str, port: int) -> WSGIServer:
    """Return an HTTP server with /metrics, /livez (it answers) and /readyz (the broker answers, a worker is up)."""
    registry = CollectorRegistry()
    watch = StoreWatch(settings_file)
    registry.register(Collector(settings, watch.rows, lambda: watch.looked))

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":  # always in the format that every version of Prometheus reads
            start("200 OK", [("Content-Type", CONTENT_TYPE_LATEST)])
            return [generate_latest(registry)]
        if path not in ("/livez", "/readyz"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"the paths are /metrics, /livez and /readyz\n"]
        wrong = unready(settings) if path == "/readyz" else ""
        start("503 Service Unavailable" if wrong else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{wrong or 'ok'}\n".encode()]

    return make_server(host, port, app, Exporter, _Handler)
