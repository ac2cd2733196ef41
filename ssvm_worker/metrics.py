"""What Prometheus reads: figures of the ledger, workers, stores, shared slots. The adapter of its client.

ssvm metrics                          once, to standard output
ssvm metrics --listen 127.0.0.1:9808  /metrics, /livez and /readyz, until SIGTERM
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from . import assembly
from .demand import decisions
from .errors import ConfigError, WorkerError
from .health import unready
from .ledger.registry import DOWN, DRAINING, UP
from .settings import Settings
from .storewatch import StoreWatch, look_at_stores

try:
    from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:
    raise ConfigError(
        "prometheus_client is not installed", "ssvm metrics", "pip install 'ssvm-worker[metrics]'"
    ) from error


class Collector:
    """Asks the broker anew at each scrape; while that is away, ``ssvm_up`` is 0 and there is nothing else."""

    def __init__(self, settings: Settings, stores: Callable[[], list[dict[str, Any]]]) -> None:
        """*stores*: the rows of ``ssvm stores --json``."""
        self._settings = settings
        self._stores = stores
        self._figures = assembly.open_figures(settings)
        self._registry = assembly.open_registry(settings)

    def collect(self) -> Iterator[Metric]:
        """All families."""
        try:
            found = [*self._jobs(), *self._running(), *self._workers(), *self._slots()]
        except WorkerError:
            found = []
        yield _gauge("ssvm_up", "Whether the broker answers", [], [([], bool(found))])
        yield from found
        yield from _store_metrics(self._stores())

    def _jobs(self) -> Iterator[Metric]:
        lanes = self._figures.lanes()
        counts = [([s, each.lane, each.zone], n) for each in lanes for s, n in each.counts.items()]
        yield _gauge("ssvm_jobs", "Jobs in the ledger", ["state", "lane", "zone"], counts)
        oldest = [([each.lane, each.zone], each.oldest_s) for each in lanes]
        yield _gauge("ssvm_queue_oldest_seconds", "Age of the oldest job that waits", ["lane", "zone"], oldest)
        names = ["job", "lane", "zone", "state", "error"]
        yield _counter("ssvm_jobs_ended", "Jobs that have ended", names, self._figures.endings().items())
        yield _counter("ssvm_bytes", "Bytes that ended jobs have moved", ["job", "zone"], self._figures.moved().items())

    def _running(self) -> Iterator[Metric]:
        claims: Counter[tuple[str, str]] = Counter()
        rates: Counter[tuple[str, str]] = Counter()
        with assembly.open_ledger(self._settings) as ledger:
            for record in ledger.page(state="running", limit=1000):
                claims[record.job, record.zone] += 1
                rates[record.job, record.zone] += int((record.progress or {}).get("rate") or 0)
        yield _gauge("ssvm_claims", "Jobs that a worker holds", ["job", "zone"], claims.items())
        text = "Bytes a second of all jobs that run"
        yield _gauge("ssvm_rate_bytes_per_second", text, ["job", "zone"], rates.items())

    def _workers(self) -> Iterator[Metric]:
        seen = self._registry.workers()
        states: Counter[tuple[str, str]] = Counter((each.info.zone, each.state) for each in seen)
        for zone in {each.info.zone for each in seen}:
            for state in (UP, DRAINING, DOWN):
                states[zone, state] += 0
        yield _gauge("ssvm_workers", "Workers by what they say of themselves", ["zone", "state"], states.items())
        capacity: Counter[tuple[str, ...]] = Counter()
        for each in seen:
            capacity[each.info.zone,] += each.info.capacity if each.state == UP else 0
        yield _gauge("ssvm_worker_capacity", "Jobs at once of all workers that are up", ["zone"], capacity.items())
        wanted = [([each.zone], each.desired) for each in decisions(self._settings)]
        yield _gauge("ssvm_workers_desired", "Workers that there should be", ["zone"], wanted)

    def _slots(self) -> Iterator[Metric]:
        held = [([name], count) for name, count in self._figures.slots().items()]
        yield _gauge("ssvm_slots_held", "Slots held of a shared limit, as leases of an ESXi host", ["limit"], held)


def _store_metrics(rows: list[dict[str, Any]]) -> Iterator[Metric]:
    up = [([row["name"]], row["state"] == "up") for row in rows]
    yield _gauge("ssvm_store_up", "Whether the image store answers", ["store"], up)
    breakers = [([row["name"], row["breaker"]], 1.0) for row in rows if "breaker" in row]
    yield _gauge("ssvm_store_breaker", "The circuit breaker's state", ["store", "state"], breakers)
    sizes = [
        ([row["name"], kind], row[kind])
        for row in rows
        for kind in ("total", "used", "free")
        if row.get(kind) is not None
    ]
    yield _gauge("ssvm_store_bytes", "Bytes of the image store", ["store", "kind"], sizes)
    latency = [([row["name"]], row["latency_ms"] / 1000) for row in rows if "latency_ms" in row]
    yield _gauge("ssvm_store_latency_seconds", "How long a look at the store took", ["store"], latency)


Values = Iterable[tuple[Iterable[str], float]]


def _gauge(name: str, text: str, labels: list[str], values: Values) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(list(key), value)
    return family


def _counter(name: str, text: str, labels: list[str], values: Values) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(list(key), value)
    return family


def text(settings: Settings, settings_file: str | None) -> str:
    """All of it once, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(Collector(settings, lambda: look_at_stores(settings_file)))
    return generate_latest(registry).decode()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


def server(settings: Settings, settings_file: str | None, host: str, port: int) -> WSGIServer:
    """An HTTP server with /metrics, /livez (it answers) and /readyz (the broker answers, a worker is up)."""
    registry = CollectorRegistry()
    registry.register(Collector(settings, StoreWatch(settings_file).rows))
    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start)  # type: ignore[no-any-return]
        if path not in ("/livez", "/readyz"):
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics, /livez and /readyz\n"]
        wrong = unready(settings) if path == "/readyz" else ""
        start("503 Service Unavailable" if wrong else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{wrong or 'ok'}\n".encode()]

    return make_server(host, port, app, _Server, _Quiet)
