"""The ``ssvm`` command: builds the parser, runs one command, and maps errors to exit statuses.

Each module of this package adds the parsers of a group of commands.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ssvm_worker import __version__
from ssvm_worker.errors import EXIT_CANCELLED, EXIT_USAGE, ConfigError, InvalidRequest, WorkerError

from .parser import CommandParser, WrongUsage, common_options

#: The modules that add commands, in the order of `ssvm --help`, and their commands.
_GROUPS = {
    "system": ("demo", "worker", "doctor", "schema"),
    "settings": ("config",),
    "completion": ("completion",),
    "install_files": ("install-files",),
    "run": ("run",),
    "submit": ("submit",),
    "queue": ("jobs", "job", "retry", "cancel"),
    "top": ("top",),
    "store": ("list", "stat", "delete", "stores"),
    "link": ("link", "serve"),
    "verify": ("verify",),
    "cleanup": ("cleanup",),
    "reap": ("reap",),
    "agent": ("agent",),
    "zone": ("quota", "workers", "scale"),
    "flower": ("flower",),
    "monitoring": ("metrics", "health"),
}

#: What people type before they know the program.
_ALIASES: dict[tuple[str, ...], list[str]] = {("help",): ["--help"], ("version",): ["--version"]}
_EXITS = """exit status:
  0  ok
  1  permanent failure: the same request will not succeed
  2  usage error: an argument or a setting is invalid, and no job was created
 75  retryable failure: the same request may succeed later
130  cancelled"""

# Before its exit, Python would search all objects of the imported libraries for garbage. That takes 50 ms.
atexit.register(gc.freeze)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    words = _ALIASES.get(tuple(words), words)
    if not words:
        make_parser().print_help(sys.stderr)
        return EXIT_USAGE
    from .output import Output

    try:
        args = make_parser(_groups_for(words)).parse_args(words)
    except WrongUsage as error:
        problem = InvalidRequest(error.problem, "", f"See `{error.command} --help`")
        Output(as_json="--json" in words).error(problem)
        return EXIT_USAGE
    output = Output(as_json=args.json, quiet=args.quiet)
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
        has_settings = config.find_file(args.config) or any(each.startswith("SSVM_") for each in os.environ)
        # The commands of these groups do without settings, or report this themselves.
        if not has_settings and not {"system", "settings", "completion"}.intersection(_groups_for(words)):
            output.note("no settings file, so defaults are in force. Create one: ssvm config init")
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
    values = {at + 1 for at, each in enumerate(words) if each == "--config"}
    command = next((each for at, each in enumerate(words) if not each.startswith("-") and at not in values), "")
    return [group for group, commands in _GROUPS.items() if command in commands] or list(_GROUPS)


def make_parser(groups: Sequence[str] = tuple(_GROUPS)) -> CommandParser:
    """Return a parser with the commands of these modules."""
    parser = CommandParser(
        prog="ssvm",
        description="The secondary storage worker. It runs downloads, uploads, snapshot backups and other jobs.",
        epilog=_EXITS,
        parents=[common_options(is_main=True)],
    )
    parser.add_argument("--version", action="version", version=f"ssvm {__version__}")
    common = common_options(is_main=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in groups:
        importlib.import_module(f".{group}", __name__).add_commands(commands, common)
    return parser
