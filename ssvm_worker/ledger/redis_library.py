"""Import redis without its metrics, which the worker does not use.

They need OpenTelemetry's SDK. If it is installed, its import takes 60 ms of CPU time and 3 MiB in each process.
"""

from __future__ import annotations

import sys

_METRICS = "opentelemetry.sdk.metrics"
_hidden = "redis" not in sys.modules and _METRICS not in sys.modules
if _hidden:
    # The import of such a module fails. redis expects that.
    sys.modules[_METRICS] = None  # type: ignore[assignment]
try:
    import redis as redis
finally:
    if _hidden:
        del sys.modules[_METRICS]
