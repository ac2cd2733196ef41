"""A collector of traces: OTLP over HTTP. It decodes them with OpenTelemetry's own definitions."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Span:
    """One span. Its ids are in hexadecimal."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    attributes: dict[str, Any]
    #: 0 unset, 2 error.
    status: int
    message: str


class Collector:
    """Collect traces on loopback."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        #: All received traces, as text.
        self.text = ""
        taken = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                taken._take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        self.text += str(request)
        for resource in request.resource_spans:
            given = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans.extend(_span(each, given) for each in scope.spans)

    def of(self, job_id: str) -> list[Span]:
        """Return the spans of the job's attempts and their stages, in the order of their arrival."""
        ours = {each.span_id for each in self.spans if each.attributes.get("ssvm.job_id") == job_id}
        return [each for each in self.spans if each.span_id in ours or each.parent in ours]

    def close(self) -> None:
        """Stop the collector."""
        self._server.shutdown()
        self._server.server_close()


def _span(each: Any, resource: dict[str, str]) -> Span:
    attributes = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in each.attributes}
    ids = (each.trace_id.hex(), each.span_id.hex(), each.parent_span_id.hex())
    return Span(each.name, *ids, resource | attributes, each.status.code, each.status.message)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Start a collector that the environment names, for workers and commands too."""
    found = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    yield found
    found.close()
