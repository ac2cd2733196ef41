"""The parser of every command: help with examples, errors that suggest what the user meant, and common options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


class WrongUsage(Exception):
    """The command line cannot be parsed."""

    def __init__(self, problem: str, command: str) -> None:
        super().__init__(problem)
        self.problem = problem
        #: The command that refused its arguments.
        self.command = command


class _Help(argparse.HelpFormatter):
    """Wraps a text of one line, and keeps the lines of a longer text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """A parser that raises WrongUsage, takes no abbreviated options, and suggests similar words.

    *examples* are command lines without ``ssvm``. They end the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        if examples:
            kwargs["epilog"] = "\n".join(["examples:", *(f"  ssvm {each}" for each in examples)])
        super().__init__(*args, **dict[str, Any](allow_abbrev=False, formatter_class=_Help) | kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise WrongUsage."""
        raise WrongUsage(message, self.prog)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown arguments here, where the options of the command are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = _suggestion(name, self._option_string_actions) if name.startswith("-") else ""
            self.error(f"unknown argument {unknown[0]!r}{near}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            near = _suggestion(str(value), choices) or f". There are: {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"unknown {value!r}{near}")


def common_options(*, is_main: bool) -> argparse.ArgumentParser:
    """Return the options that work before and after each command.

    Only the main parser has their defaults. A command sets nothing that its user does not give, so that it keeps what
    was given before it.
    """

    def default(value: Any) -> Any:
        return value if is_main else argparse.SUPPRESS

    parser = argparse.ArgumentParser(add_help=False)
    common = parser.add_argument_group("common options")
    common.add_argument(
        "--json", action="store_true", default=default(False), help="print the result or the error as one JSON value"
    )
    common.add_argument(
        "--config",
        metavar="FILE",
        default=default(None),
        help="read the settings from FILE (default: SSVM_CONFIG, then /etc/ssvm/worker.toml)",
    )
    common.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=default(False),
        help="print neither progress nor remarks, only results and errors",
    )
    common.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=default(False),
        help="also log informational events to standard error",
    )
    return parser


def _suggestion(word: str, known: Any) -> str:
    from ssvm_worker.config.findings import suggestion  # imports pydantic, and only an error needs it

    return suggestion(word, known)
