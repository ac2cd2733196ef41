"""The shell's door: one small module per group of commands, one place for errors and exit codes."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ssvm_worker import __version__, config
from ssvm_worker.config.schema import LogSection
from ssvm_worker.errors import EXIT_CANCELLED, ConfigError, WorkerError
from ssvm_worker.operations import logs

from .output import Output

#: The modules that have the commands, in the order of `ssvm --help`.
_GROUPS = (
    "system",
    "run",
    "queue",
    "store",
    "link",
    "verify",
    "cleanup",
    "reap",
    "quota",
    "workers",
    "scale",
    "monitoring",
)

_EXITS = """exit status:
  0  ok
  1  permanent failure: the same request will not succeed
  2  usage: a value that is wrong before a job exists, or wrong settings
 75  retryable failure: the same request may succeed later
130  cancelled"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    # `run` alone: to load what the other commands need takes as long as a small job.
    args = make_parser(("run",) if list(words[:1]) == ["run"] else _GROUPS).parse_args(words)
    output = Output(as_json=args.json)
    # A terminal that has no UTF-8 gets escapes in place of an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _start_logging(args)
        return int(args.command(args, output) or 0)
    except WorkerError as error:
        output.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_CANCELLED
    except BrokenPipeError:
        # The reader of our output has gone (`ssvm list | head`): nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _start_logging(args: argparse.Namespace) -> None:
    """As the settings say, but for what a person sees; what is wrong with them the command tells itself."""
    try:
        given = config.load(args.config).log
    except ConfigError:
        given = LogSection()
    logs.start(given, "info" if args.verbose else "warning")


def make_parser(groups: Sequence[str] = _GROUPS) -> argparse.ArgumentParser:
    """The commands of these modules, with their options."""
    parser = argparse.ArgumentParser(
        prog="ssvm",
        description="The secondary storage worker: downloads, uploads and snapshot backups as jobs.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssvm {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result, or the error, as one JSON value")
    common.add_argument("--config", metavar="FILE", help="the settings file; else SSVM_CONFIG")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens to standard error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in groups:
        importlib.import_module(f".{group}", __name__).add_commands(commands, common)
    return parser
