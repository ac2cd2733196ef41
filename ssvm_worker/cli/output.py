"""What a person or a program gets to read: tables, JSON, errors, and a tqdm bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ssvm_worker.errors import WorkerError
from ssvm_worker.units import human_size

#: Columns that hold bytes.
_SIZES = ("size", "bytes", "virtual_size", "total", "used", "free", "reserved", "limit")


class Output:
    """Standard output in the form that was asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, value: Any, text: str | None = None) -> None:
        """Print a result: JSON when asked for, else *text*, else ``name: value`` lines."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False))
        elif text is not None:
            print(text)
        else:
            print("\n".join(f"{name}: {plain(name, each)}" for name, each in value.items()))

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
        """Print rows: a JSON list of the whole rows, or a table of some columns."""
        if self.as_json:
            print(json.dumps(list(rows), ensure_ascii=False))
        elif not rows:
            print(empty)
        else:
            print("\n".join(_aligned([columns, *([plain(name, row.get(name)) for name in columns] for row in rows)])))

    def error(self, error: WorkerError) -> None:
        """Print an error: for people to standard error, and as JSON to standard output when asked for."""
        if self.as_json:
            print(json.dumps(error.as_dict(), ensure_ascii=False))
        print(f"ssvm: {type(error).__name__}: {error}", file=sys.stderr)


def plain(name: str, value: Any) -> str:
    """A value for people; sizes with a unit behind the exact number."""
    if value is None:
        return "-"
    if isinstance(value, int) and name in _SIZES:
        return f"{value} ({human_size(value)})" if value >= 1000 else str(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    lines = list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


class Bar:
    """A tqdm bar fed with progress records; silent where standard error is no terminal."""

    def __init__(self, label: str, *, disable: bool = False) -> None:
        self._label = label
        self._tqdm: tqdm[Any] = tqdm(
            desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=True if disable else None, leave=True
        )

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a progress record: stage, bytes, total, rate."""
        if record.get("total") != self._tqdm.total:
            self._tqdm.total = record.get("total")
        self._tqdm.set_description(f"{self._label} {record.get('stage', '')}", refresh=False)
        self._tqdm.n = record.get("bytes", 0)
        self._tqdm.refresh()

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._tqdm.close()
