"""What commands print: tables, JSON, errors, and the report of a migration."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from ssvm_worker.errors import ConfigError, WorkerError
from ssvm_worker.units import human_size, printable

#: Columns that hold bytes.
_SIZES = ("size", "bytes", "virtual_size", "new_bytes", "reused_bytes", "total", "used", "free", "reserved", "limit")
#: Bytes of a table in memory; the rest of the table is in a temporary file.
_MAX_MEMORY = 8 << 20
#: The least width of the last column of a table. Where it is narrower, it has its own lines.
_MIN_LAST = 30
#: The colours of states: ECMA-48, SGR. Other words have none.
_RED, _YELLOW, _GREEN, _CYAN = 31, 33, 32, 36
_COLOURS = {
    **dict.fromkeys(("failed", "down", "Down"), _RED),
    **dict.fromkeys(("warning", "cancelled", "Draining"), _YELLOW),
    **dict.fromkeys(("ok", "succeeded", "up", "Up"), _GREEN),
    "running": _CYAN,
}


class Output:
    """Standard output, as text or as JSON."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        #: Print neither progress nor remarks.
        self.quiet = quiet

    @property
    def width(self) -> int | None:
        """Return the columns of the terminal, or None if standard output is not a terminal."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def line(self, text: str) -> None:
        """Print one line of a longer result. With ``--json`` print nothing."""
        if not self.as_json:
            print(printable(text))

    def note(self, text: str) -> None:
        """Print a remark to standard error, unless the user gave ``--quiet``."""
        if not self.quiet:
            print(printable(f"ssvm: {text}"), file=sys.stderr)

    def result(self, value: Any, text: str | None = None) -> None:
        """Print a result: as JSON if the user gave ``--json``, else as *text*, else as ``name: value`` lines."""
        if self.as_json:
            print(_json(value))
        else:
            print(printable(named_lines(value) if text is None else text, keep="\n"))

    def table(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
        """Print rows: a JSON list of the complete rows, or a table of some columns. Print *empty* if there are none.

        Printing starts after the last row has arrived, so that an error leaves no half list. Holds 8 MiB in memory.
        """
        with tempfile.SpooledTemporaryFile(_MAX_MEMORY, "w+", encoding="utf-8") as spool:
            if self.as_json:
                for number, row in enumerate(rows):
                    spool.write(f"{', ' if number else ''}{_json(row)}")
                spool.seek(0)
                sys.stdout.write("[")
                shutil.copyfileobj(spool, sys.stdout)
                sys.stdout.write("]\n")
                return
            widths = dict.fromkeys(columns, 0)
            for row in rows:
                cells = {name: cell(name, row.get(name)) for name in columns}
                widths = {name: max(width, len(cells[name])) for name, width in widths.items()}
                spool.write(json.dumps(cells) + "\n")
            if not spool.tell():
                print(empty)
                return
            # A column without any value is left out.
            widths = {name: max(len(name), width) for name, width in widths.items() if width}
            spool.seek(0)
            head = {name: name for name in widths}
            for cells in itertools.chain([head], map(json.loads, spool)):
                print("\n".join(table_lines(cells, widths, self.width)))

    def error(self, error: WorkerError) -> None:
        """Print an error to standard error, and also as JSON to standard output if the user gave ``--json``.

        The result of a partly done job is printed to standard output. Each problem of the settings has its own line.
        """
        problems = error.problems if isinstance(error, ConfigError) else ()
        if self.as_json:
            more = {"result": error.result, "problems": list(problems)}
            print(_json(error.as_dict() | {name: value for name, value in more.items() if value}))
        elif report := migration_report(error.result):
            print(report)
        name = _coloured(type(error).__name__, _RED, sys.stderr)
        text = f"Invalid settings [{error.where}]. {error.remedy}:" if problems else printable(str(error))
        print("\n  ".join([f"ssvm: {name}: {text}", *problems]), file=sys.stderr)


def table_lines(cells: Mapping[str, str], widths: Mapping[str, int], width: int | None) -> Iterator[str]:
    """Yield the lines of one row. If the row is wider than the terminal, the last column is wrapped."""
    *names, last = widths
    padded = [f"{painted(name, cells[name].ljust(widths[name]))}  " for name in names]
    used = sum(widths[name] + 2 for name in names)
    if width is None or used + widths[last] <= width:
        yield "".join([*padded, painted(last, cells[last])]).rstrip()
        return
    has_own_lines = width - used < _MIN_LAST
    indent = 4 if has_own_lines else used
    wrapped = textwrap.wrap(cells[last], max(_MIN_LAST, width - indent), break_on_hyphens=False)
    if has_own_lines and cells[last] == last:
        wrapped = []  # a heading does not stand over lines of their own
    first = "" if has_own_lines or not wrapped else wrapped.pop(0)
    yield ("".join(padded) + first).rstrip()
    yield from (" " * indent + each for each in wrapped)


def painted(column: str, text: str) -> str:
    """Return a cell, with its colour if the column is ``state`` and standard output is a terminal with colours."""
    code = _COLOURS.get(text.strip()) if column == "state" else None
    return _coloured(text, code, sys.stdout) if code else text


def _coloured(text: str, code: int, stream: TextIO) -> str:
    """Return the text in a colour, unless the stream is no terminal or NO_COLOR is set (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def _json(value: Any) -> str:
    """Return one line of JSON. Control characters and characters without a UTF-8 form are escaped."""
    return printable(json.dumps(value, ensure_ascii=False))


def named_lines(value: Mapping[str, Any]) -> str:
    """Return the fields of a result that have a value, as ``name: value`` lines. A large size is also rounded."""
    lines = []
    for name, each in value.items():
        if name == "owed":
            lines += [printable(f"missing: {text}") for text in missing_stores(value)]
        elif isinstance(each, int) and name in _SIZES and each >= 1000:
            lines.append(f"{name}: {each} ({human_size(each)})")
        elif text := cell(name, each):
            lines.append(printable(f"{name}: {text}"))
    return "\n".join(lines)


def missing_stores(result: Mapping[str, Any]) -> list[str]:
    """Return a line for each store that a job could not write: the reason, and what copies the artifact."""
    found = []
    for store, problem in (result.get("owed") or {}).items():
        then = f"The job {problem['copy_job']} copies it" if problem.get("copy_job") else "See `ssvm run copy --help`"
        found.append(f"store {store}: {problem.get('error')}: {problem.get('what')}. {then}")
    return found


def cell(name: str, value: Any) -> str:
    """Return a value as one line of text; empty for an empty value."""
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name in _SIZES:
        return human_size(value)
    if isinstance(value, list) and not any(isinstance(each, list | dict) for each in value):
        return printable(", ".join(map(str, value)))
    return _json(value) if isinstance(value, dict | list) else printable(str(value))


def migration_report(result: Mapping[str, Any] | None) -> str | None:
    """Return the report of a copy of many artifacts: a line for each, then the sums. None for any other result."""
    if not result or "artifacts" not in result or "counts" not in result:
        return None
    lines = []
    for row in result["artifacts"]:
        detail = row["error"]["message"] if "error" in row else human_size(row["bytes"]) if "bytes" in row else ""
        lines.append(printable(f"{row['outcome']:9} {row['artifact']}  {detail}").rstrip())
    unlisted = sum(result["counts"].values()) - len(lines)
    if unlisted > 0:
        lines.append(f"and {unlisted} more")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()) or "none"
    counts += f", {result['not_begun']} not started" if result["not_begun"] else ""
    route = f"{result['source']} to {', '.join(result['stores'])}"
    lines.append(f"{counts}; of {result['found']} artifacts, {human_size(result['bytes'])}, from {route}")
    if result["others"]:
        lines.append(f"{result['others']} objects belong to no complete artifact and were not copied")
    return "\n".join(lines)
