"""The help, the completion and the man pages come from the parsers, and their examples are correct."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path

import pytest

from docs import man
from ssvm_worker.cli import main, make_parser
from ssvm_worker.cli.completion import all_parsers
from ssvm_worker.cli.request_options import JobParser, read_request
from ssvm_worker.jobs.request import parse_request

#: Completes each line of its input, whose last word is incomplete, and prints the candidates.
_COMPLETE = """
source "$1"
while IFS= read -r line; do
    eval "COMP_WORDS=($line)"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMPREPLY=()
    _shtab_ssvm
    echo "${COMPREPLY[*]}"
done
"""
COMPLETED = {
    "ssvm jo": "jobs job",
    "ssvm run downl": "download",
    "ssvm jobs --stat": "--state",
    "ssvm jobs --state fa": "failed",
    "ssvm submit download --unique": "--unique-name",
    "ssvm run download --kind i": "iso",
    "ssvm completion ''": "bash zsh fish",
}


def test_each_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each help fits 80 columns, shows required arguments without brackets, and ends with correct examples."""
    monkeypatch.setenv("COLUMNS", "80")
    main_parser = make_parser()
    for parser in all_parsers(main_parser):
        text, usage = parser.format_help(), " ".join(parser.format_usage().split()) + " "
        assert max(map(len, text.splitlines())) <= 80, parser.prog
        for needed in _required(parser):
            assert f" {needed}" in usage, parser.prog
            assert f"[{needed}" not in usage, parser.prog
        if parser is not main_parser:
            _check_examples(text, main_parser)


def _required(parser: argparse.ArgumentParser) -> list[str]:
    positional = [str(each.metavar or each.dest) for each in parser._actions if each.required and each.nargs != "*"]
    fields = parser.job.Request.model_fields if isinstance(parser, JobParser) and parser.job else {}
    return positional + [f"--{name.replace('_', '-')} " for name, each in fields.items() if each.is_required()]


def _check_examples(text: str, parser: argparse.ArgumentParser) -> None:
    """Parse the examples of a help, and validate their requests."""
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert examples, text
    for line in examples:
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        assert words[0] == "ssvm"
        if "--help" in words:
            continue
        args = parser.parse_args(words[1:])
        if getattr(args, "job", None) and getattr(args, "request", "") is None:
            parse_request(args.job.Request, read_request(args, args.job.Request), args.job.name)


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bash completes commands, jobs, options, and the choices of options."""
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "ssvm"
    script.write_text(capsys.readouterr().out)

    command = ["bash", "-c", _COMPLETE, "bash", str(script)]
    done = subprocess.run(command, input="\n".join(COMPLETED) + "\n", capture_output=True, text=True)

    assert (done.stdout.splitlines(), done.stderr) == ([*COMPLETED.values()], "")


def test_man_pages() -> None:
    """Each command has a man page with its name, its summary and its examples."""
    pages = dict(man.pages())
    commands = next(each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    assert [*pages] == ["ssvm", *(f"ssvm-{name}" for name in commands.choices)]
    for choice in commands._choices_actions:
        page = pages[f"ssvm-{choice.dest}"]
        name = choice.dest.replace("-", r"\-")
        assert rf"ssvm\-{name} \- " in page
        assert ".SH EXAMPLES" in page
    assert r"\-\-unique\-name" in pages["ssvm-run"]
