"""``ssvm flower``: starts Flower, the web page for administrators, with the page of jobs."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import Any

from ssvm_worker import config
from ssvm_worker.errors import InvalidRequest, extra_missing, misused

from .output import Output

#: Each of these variables names a login: config/flower/flowerconfig.py.
_LOGINS = ("FLOWER_BASIC_AUTH", "FLOWER_BASIC_AUTH_FILE", "FLOWER_AUTH")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm flower``."""
    parser = commands.add_parser(
        "flower",
        help="run Flower, the web page for administrators, until SIGTERM",
        description="The login comes from --login-file, FLOWER_BASIC_AUTH or FLOWER_AUTH. Flower has no TLS. "
        "It listens on loopback, so put a TLS proxy in front of it.",
        examples=("flower --login-file /etc/ssvm/flower", "flower --port 5556 --url-prefix flower"),
        parents=[common],
    )
    parser.add_argument("--login-file", metavar="FILE", help="read name:password[,name:password] from FILE")
    parser.add_argument("--address", help="listen on this address (default: FLOWER_ADDRESS, then 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5555, help="listen on this port (default: 5555)")
    parser.add_argument("--url-prefix", metavar="PATH", help="the path of Flower behind the proxy")
    parser.set_defaults(command=_flower)


def _flower(args: argparse.Namespace, output: Output) -> int:
    if find_spec("flower") is None:
        raise extra_missing("Flower is not installed", "flower", "flower")
    config.load(args.config)  # wrong settings fail here, not later in Flower
    environ = dict(os.environ)
    if file := config.find_file(args.config):
        environ["SSVM_CONFIG"] = str(file.absolute())
    if args.login_file:
        environ["FLOWER_BASIC_AUTH_FILE"] = args.login_file
        environ.pop("FLOWER_BASIC_AUTH", None)
    if args.address:
        environ["FLOWER_ADDRESS"] = args.address
    if not any(environ.get(name) for name in _LOGINS):
        remedy = "Give --login-file FILE, or set FLOWER_BASIC_AUTH=name:password"
        raise misused(InvalidRequest("Flower needs a login", "flower", remedy))
    settings = config.shipped_files() / "flower" / "flowerconfig.py"
    argv = [sys.executable, "-P", "-m", "tasks", "flower", f"--conf={settings}", f"--port={args.port}"]
    argv += [f"--url-prefix={args.url_prefix}"] if args.url_prefix else []
    output.note(f"Flower starts on port {args.port}")
    sys.stdout.flush()
    os.execve(argv[0], argv, environ)
