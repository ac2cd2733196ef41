"""The ``ssvm`` command: builds the parser, runs one command, and maps errors to exit statuses.

Each module of this package adds the parsers of a group of commands.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ssvm_worker import __version__
from ssvm_worker.errors import EXIT_CANCELLED, ConfigError, WorkerError

#: The modules that add commands, in the order of `ssvm --help`, and their commands.
_GROUPS = {
    "system": ("demo", "worker", "doctor", "schema", "config"),
    "run": ("run",),
    "submit": ("submit",),
    "queue": ("jobs", "job", "retry", "cancel"),
    "store": ("list", "stat", "delete", "stores"),
    "link": ("link", "serve"),
    "verify": ("verify",),
    "cleanup": ("cleanup",),
    "reap": ("reap",),
    "agent": ("agent",),
    "zone": ("quota", "workers", "scale"),
    "monitoring": ("metrics", "health"),
}

_EXITS = """exit status:
  0  ok
  1  permanent failure: the same request will not succeed
  2  usage error: an argument or a setting is invalid, and no job was created
 75  retryable failure: the same request may succeed later
130  cancelled"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    args = make_parser(_groups_for(words)).parse_args(words)
    from .output import Output

    output = Output(as_json=args.json)
    # On a terminal without UTF-8, print escapes instead of raising UnicodeEncodeError.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        # Configure logging from the settings, except the level, which depends on ``--verbose``. Invalid settings are
        # ignored here: the command itself reports them.
        from ssvm_worker import config
        from ssvm_worker.config.schema import LogSection
        from ssvm_worker.operations import logs

        try:
            section = config.load(args.config).log
        except ConfigError:
            section = LogSection()
        logs.start(section, "info" if args.verbose else "warning")
        return int(args.command(args, output) or 0)
    except WorkerError as error:
        output.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_CANCELLED
    except BrokenPipeError:
        # The reader of standard output has ended, as in `ssvm list | head`. This is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _groups_for(words: Sequence[str]) -> Sequence[str]:
    """Return the modules that parse this command line: the command's module, or all if the command is unknown.

    Importing the modules of all commands takes as long as a small job.
    """
    if list(words) == ["--version"]:
        return ()
    command = next((each for each in words if not each.startswith("-")), "")
    return [group for group, commands in _GROUPS.items() if command in commands] or list(_GROUPS)


def make_parser(groups: Sequence[str] = tuple(_GROUPS)) -> argparse.ArgumentParser:
    """Return a parser with the commands of these modules."""
    parser = argparse.ArgumentParser(
        prog="ssvm",
        description="The secondary storage worker. It runs downloads, uploads, snapshot backups and other jobs.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssvm {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result or the error as one JSON value")
    common.add_argument("--config", metavar="FILE", help="read the settings from FILE instead of SSVM_CONFIG")
    common.add_argument("-v", "--verbose", action="store_true", help="also log informational events to standard error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in groups:
        importlib.import_module(f".{group}", __name__).add_commands(commands, common)
    return parser
