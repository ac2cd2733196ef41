"""What commands print: tables, JSON, errors, and the report of a migration."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssvm_worker.errors import WorkerError
from ssvm_worker.units import human_size, printable

#: Columns that hold bytes.
_SIZES = ("size", "bytes", "virtual_size", "total", "used", "free", "reserved", "limit")
#: Bytes of a table in memory; the rest of the table is in a temporary file.
_MAX_MEMORY = 8 << 20


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
        elif text is not None:
            print(printable(text, keep="\n"))
        else:
            print("\n".join(f"{printable(name)}: {plain(name, each)}" for name, each in value.items()))

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
            widths = [len(each) for each in columns]
            for row in rows:
                cells = [plain(name, row.get(name)) for name in columns]
                widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
                spool.write(json.dumps(cells) + "\n")
            if not spool.tell():
                print(empty)
                return
            spool.seek(0)
            for cells in itertools.chain([columns], map(json.loads, spool)):
                padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
                print("  ".join(padded).rstrip())

    def error(self, error: WorkerError) -> None:
        """Print an error to standard error, and also as JSON to standard output if the user gave ``--json``.

        The result of a partly done job is printed to standard output.
        """
        if self.as_json:
            print(_json(error.as_dict() | ({"result": error.result} if error.result else {})))
        elif report := migration_report(error.result):
            print(report)
        print(printable(f"ssvm: {type(error).__name__}: {error}"), file=sys.stderr)


def _json(value: Any) -> str:
    """Return one line of JSON. Control characters and characters without a UTF-8 form are escaped."""
    return printable(json.dumps(value, ensure_ascii=False))


def plain(name: str, value: Any) -> str:
    """Return a value as one line of text. A large size is the exact number with a rounded one in parentheses."""
    if value is None:
        return "-"
    if isinstance(value, int) and name in _SIZES:
        return f"{value} ({human_size(value)})" if value >= 1000 else str(value)
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
