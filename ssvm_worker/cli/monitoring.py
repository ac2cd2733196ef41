"""``ssvm metrics | health``: metrics for Prometheus, and liveness and readiness probes."""

from __future__ import annotations

import argparse
import signal
import socket
import threading
from typing import Any

from ssvm_worker import config
from ssvm_worker.errors import EXIT_RETRYABLE, ConfigError

from .output import Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm metrics | health``."""
    metrics = commands.add_parser(
        "metrics",
        help="print the metrics for Prometheus, or serve them over HTTP",
        examples=("metrics", "metrics --listen 127.0.0.1:9808"),
        parents=[common],
    )
    metrics.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="serve /metrics, /livez and /readyz until SIGTERM, for example on 127.0.0.1:9808",
    )
    metrics.set_defaults(command=_metrics)
    probe = commands.add_parser(
        "health",
        help="check that the worker of this host is alive",
        examples=("health", "health --ready"),
        parents=[common],
    )
    probe.add_argument("--ready", action="store_true", help="check that the worker would take a job")
    probe.set_defaults(command=_health)


def _metrics(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations import metrics  # prometheus_client is an extra

    settings = config.load(args.config)
    if not args.listen:
        text = metrics.text(settings, args.config)
        output.result({"metrics": text}, text.rstrip("\n"))
        return 0
    host, _, port = args.listen.rpartition(":")
    if not port.isdecimal():
        raise ConfigError("Invalid HOST:PORT", args.listen, "Give an address such as --listen 127.0.0.1:9808")
    try:
        server = metrics.server(settings, args.config, host.strip("[]"), int(port))
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on this address: {error.strerror or error}", args.listen, "Choose another address"
        ) from error
    # shutdown() waits for the end of the loop. A signal handler runs inside the loop, so shutdown() needs a thread.
    stop = threading.Thread(target=server.shutdown, daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if stop.is_alive() else stop.start())
    server.serve_forever()
    server.server_close()
    return 0


def _health(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations import health  # imports redis

    settings, host = config.load(args.config), socket.gethostname()
    reason = health.unready(settings, host) if args.ready else health.dead(settings, host)
    output.result({"ok": not reason, "why": reason or None}, reason or "ok")
    return EXIT_RETRYABLE if reason else 0
