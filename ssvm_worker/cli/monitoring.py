"""What monitoring asks: metrics for Prometheus, and probes."""

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
    """``ssvm metrics | health``."""
    metrics = commands.add_parser("metrics", help="the figures for Prometheus, once or over HTTP", parents=[common])
    metrics.add_argument(
        "--listen", metavar="HOST:PORT", help="serve /metrics, /livez and /readyz until SIGTERM, as on 127.0.0.1:9808"
    )
    metrics.set_defaults(command=_metrics)
    probe = commands.add_parser("health", help="does this host's worker live? for probes", parents=[common])
    probe.add_argument("--ready", action="store_true", help="would it take a job?")
    probe.set_defaults(command=_health)


def _metrics(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations import metrics  # its client is an extra

    settings = config.load(args.config)
    if not args.listen:
        text = metrics.text(settings, args.config)
        output.result({"metrics": text}, text.rstrip("\n"))
        return 0
    host, _, port = args.listen.rpartition(":")
    if not port.isdecimal():
        raise ConfigError("This is no HOST:PORT", args.listen, "Give --listen 127.0.0.1:9808 or the like")
    try:
        server = metrics.server(settings, args.config, host.strip("[]"), int(port))
    except OSError as error:
        raise ConfigError(
            f"Nothing can listen there: {error.strerror or error}", args.listen, "Choose another"
        ) from error
    # shutdown() waits for the loop to end, so it must not be called from within it.
    stop = threading.Thread(target=server.shutdown, daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if stop.is_alive() else stop.start())
    server.serve_forever()
    server.server_close()
    return 0


def _health(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations import health  # redis comes with it

    settings, host = config.load(args.config), socket.gethostname()
    wrong = health.unready(settings, host) if args.ready else health.dead(settings, host)
    output.result({"ok": not wrong, "why": wrong or None}, wrong or "ok")
    return EXIT_RETRYABLE if wrong else 0
