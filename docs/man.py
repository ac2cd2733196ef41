"""Write the man pages, one for each command: ``python -m docs.man DIRECTORY``. `make man` runs it.

argparse-manpage makes them from the parsers, so they have the text of `ssvm COMMAND --help`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from argparse_manpage.manpage import Manpage

from ssvm_worker import __version__
from ssvm_worker.cli import make_parser
from ssvm_worker.cli.completion import all_parsers


def pages() -> Iterator[tuple[str, str]]:
    """Yield name and text of each page: ``ssvm`` with the list of commands, then ``ssvm-jobs`` and so on."""
    parser = make_parser()
    list(all_parsers(parser))  # adds the options of all jobs
    (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    notes = {each.dest: str(each.help) for each in commands._choices_actions}
    found = dict(commands.choices)
    # The page of the program only lists the commands. Each command has its own page.
    commands.choices.clear()
    yield "ssvm", _page(parser, "the secondary storage worker", "pretty")
    for name, each in found.items():
        yield f"ssvm-{name}", _page(each, notes[name])


def _page(parser: argparse.ArgumentParser, note: str, form: str = "single-commands-section") -> str:
    title, _, lines = (parser.epilog or "").partition(":\n")
    parser.epilog = None
    about = {"description": note, "project_name": "ssvm-worker", "version": __version__}
    page = Manpage(parser, _data=about | {"manual_title": "ssvm-worker"}, format=form)
    page.prog = parser.prog.replace(" ", "-")
    page.add_section(title.upper(), "=", f".nf\n{_plain(lines)}\n.fi")
    page.add_section("SEE ALSO", "=", ".BR ssvm (1)\nlists the commands.")
    return str(page)


def _plain(text: str) -> str:
    r"""Return lines that roff prints as they are. A dash is ``\-``, so that a copied command is correct."""
    return re.sub("^([.'])", r"\\&\1", text.replace("\\", "\\e").replace("-", r"\-"), flags=re.MULTILINE)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages():
        (directory / f"{name}.1").write_text(text)
