"""OpenTelemetry traces (extra ``otel``): a span for each attempt, and below it a span for each stage.

The standard variables configure them: OTEL_EXPORTER_OTLP_ENDPOINT, _HEADERS, _CERTIFICATE, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER and so on. Without an endpoint nothing is imported. Spans are sent by OTLP over HTTP. A collector
that is away costs spans, never a job. A span has ids, numbers, and the error of the job's record. It has no URL and
no request.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from ssvm_worker.errors import installation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_LOG = logging.getLogger("ssvm.traces")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent(value: object) -> str:
    """Return a sender's W3C trace context, or "" if it is invalid."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else ""


class Trace:
    """The trace of one attempt."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._stage: Span | None = None
        self._name = ""

    def show(self, progress: dict[str, Any]) -> None:
        """Set the bytes of the stage's span. A new stage ends one span and starts the next."""
        from opentelemetry.trace import set_span_in_context

        if progress["stage"] != self._name:
            self.leave()
            self._name = progress["stage"]
            self._stage = self._tracer.start_span(self._name, context=set_span_in_context(self._span))
        if self._stage:
            self._stage.set_attribute("ssvm.bytes", progress["bytes"])

    def fail(self, error: Mapping[str, Any]) -> None:
        """Mark the attempt as failed, with the error object of the record."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes({"error.type": error["error"], "ssvm.retryable": bool(error["retryable"])})
        self._span.set_status(Status(StatusCode.ERROR, error["message"]))

    def note(self, **attributes: str | int) -> None:
        """Set attributes of the attempt's span."""
        self._span.set_attributes({f"ssvm.{name}": value for name, value in attributes.items()})

    def leave(self) -> None:
        """End the span of the current stage. Safe to repeat."""
        if self._stage:
            self._stage.end()
        self._stage, self._name = None, ""


class _Untraced(Trace):
    """The trace without a collector."""

    def __init__(self) -> None:
        """Store nothing."""

    def show(self, progress: dict[str, Any]) -> None:
        pass

    def fail(self, error: Mapping[str, Any]) -> None:
        pass

    def note(self, **attributes: str | int) -> None:
        pass


UNTRACED: Trace = _Untraced()


@contextmanager
def tracing(job: str, parent: str = "", **attributes: str | int) -> Iterator[Trace]:
    """Trace an attempt while the block runs. *parent* is the sender's trace context."""
    provider = _provider() if any(os.environ.get(each) for each in _ENDPOINTS) else None
    if provider is None:
        yield UNTRACED
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("ssvm_worker")
    context = TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
    span = tracer.start_span(f"ssvm.{job}", context=context, kind=SpanKind.CONSUMER)
    trace = Trace(tracer, span)
    trace.note(job=job, **attributes)
    try:
        yield trace
    finally:
        trace.leave()
        span.end()


def close() -> None:
    """Send the remaining spans, for a process that ends without atexit. Wait up to OTEL_EXPORTER_OTLP_TIMEOUT."""
    if _provider.cache_info().currsize and (provider := _provider()):
        provider.shutdown()
        _provider.cache_clear()


@cache
def _provider() -> TracerProvider | None:
    """Return the provider of this process. Its thread that sends spans would not survive a fork."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _LOG.warning("OTEL_… is set, but OpenTelemetry is not installed. %s", installation("otel"))
        return None
    from ssvm_worker import __version__

    attributes = {SERVICE_VERSION: __version__}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        attributes[SERVICE_NAME] = "ssvm-worker"
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
