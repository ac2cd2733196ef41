"""``ssvm completion``: prints a script by which the shell completes commands, options and choices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .output import Output
from .request_options import JobParser

_SHELLS = ("bash", "zsh", "fish")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm completion``."""
    note = "print a script by which the shell completes commands and options"
    parser = commands.add_parser(
        "completion",
        help=note,
        description=f"{note.capitalize()}. Save it where the shell looks for such scripts.",
        examples=(
            "completion bash > /etc/bash_completion.d/ssvm",
            "completion zsh > /usr/local/share/zsh/site-functions/_ssvm",
            "completion fish > ~/.config/fish/completions/ssvm.fish",
        ),
        parents=[common],
    )
    parser.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    parser.set_defaults(command=_completion)


def _completion(args: argparse.Namespace, output: Output) -> int:
    import shtab

    from . import make_parser

    parser = make_parser()
    for each in all_parsers(parser):
        for action in each._actions:
            metavar = str(action.metavar)
            if metavar == "FILE":
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab marks an argument
            elif "|" in metavar and metavar.islower():  # choices that the model of a request checks
                action.choices = metavar.split("|")
    script = shtab.complete(parser, args.shell)
    output.result({"script": script}, script.rstrip())
    return 0


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and all parsers of its commands, with the options of all jobs."""
    if isinstance(parser, JobParser):
        parser.add_fields()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from all_parsers(each)
