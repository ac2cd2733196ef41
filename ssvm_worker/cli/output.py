"""What a person or a program gets to read: tables, JSON, errors, and a tqdm bar on a terminal."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from tqdm import tqdm

from ssvm_worker.errors import WorkerError
from ssvm_worker.units import human_size, printable

from .told import told

#: Columns that hold bytes.
_SIZES = ("size", "bytes", "virtual_size", "total", "used", "free", "reserved", "limit")


#: Bytes of a table in memory; the rest of it waits in a file.
_HELD = 8 << 20


class Output:
    """Standard output in the form that was asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, value: Any, text: str | None = None) -> None:
        """Print a result: JSON when asked for, else *text*, else ``name: value`` lines."""
        if self.as_json:
            print(_json(value))
        elif text is not None:
            print(printable(text, keep="\n"))
        else:
            print("\n".join(f"{printable(name)}: {plain(name, each)}" for name, each in value.items()))

    def table(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
        """Print rows: a JSON list of the whole rows, or a table of some columns.

        Nothing is printed before the last row has come, so what ends in an error prints no half list. Holds 8 MiB.
        """
        with tempfile.SpooledTemporaryFile(_HELD, "w+", encoding="utf-8") as kept:
            if self.as_json:
                for number, row in enumerate(rows):
                    kept.write(f"{', ' if number else ''}{_json(row)}")
                _print(kept, before="[", behind="]\n")
                return
            widths = [len(each) for each in columns]
            for row in rows:
                cells = [plain(name, row.get(name)) for name in columns]
                widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
                kept.write(json.dumps(cells) + "\n")
            if not kept.tell():
                print(empty)
                return
            kept.seek(0)
            for cells in itertools.chain([columns], map(json.loads, kept)):
                padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
                print("  ".join(padded).rstrip())

    def error(self, error: WorkerError) -> None:
        """Print an error: for people to standard error, and as JSON to standard output when asked for."""
        done = {"result": error.result} if error.result else {}
        if self.as_json:
            print(_json(error.as_dict() | done))
        elif text := told(error.result):
            print(text)
        print(printable(f"ssvm: {type(error).__name__}: {error}"), file=sys.stderr)


def _json(value: Any) -> str:
    """JSON in one line; characters that steer a terminal, or have no UTF-8 form, are escaped in it."""
    return printable(json.dumps(value, ensure_ascii=False))


def plain(name: str, value: Any) -> str:
    """A value for people, in one line; sizes with a unit behind the exact number."""
    if value is None:
        return "-"
    if isinstance(value, int) and name in _SIZES:
        return f"{value} ({human_size(value)})" if value >= 1000 else str(value)
    return _json(value) if isinstance(value, dict | list) else printable(str(value))


def _print(kept: IO[str], before: str, behind: str) -> None:
    kept.seek(0)
    sys.stdout.write(before)
    shutil.copyfileobj(kept, sys.stdout)
    sys.stdout.write(behind)


class Bar:
    """A tqdm bar fed with progress records; silent where standard error is no terminal."""

    def __init__(self, label: str, *, disable: bool = False) -> None:
        self._label = printable(label)
        self._shown = False
        # A console of no size, as serial ones are, would show nothing.
        size = shutil.get_terminal_size()
        self._tqdm: tqdm[Any] = tqdm(
            desc=self._label,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=True if disable else None,
            ncols=size.columns,
            nrows=size.lines,
        )

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a progress record: stage, bytes, total, rate."""
        if record.get("total") != self._tqdm.total:
            self._tqdm.total = record.get("total")
        self._tqdm.set_description(f"{self._label} {printable(str(record.get('stage', '')))}", refresh=False)
        moved = record.get("bytes", 0)
        if not self._shown or moved < self._tqdm.n:
            # The rate is that of what moves from now on: a job may be half done when somebody begins to look.
            self._shown, self._tqdm.initial = True, moved
            self._tqdm.start_t = self._tqdm.last_print_t = time.time()
        self._tqdm.n = moved
        self._tqdm.refresh()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._tqdm.close()
