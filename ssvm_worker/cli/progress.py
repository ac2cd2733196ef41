"""Progress as one line of text, and as a tqdm bar on a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssvm_worker.units import human_duration, human_size, printable

if TYPE_CHECKING:
    from tqdm import tqdm

#: Seconds between two lines if standard error is not a terminal.
_LINE_EVERY_S = 60.0
#: The least width of a bar. A smaller one says nothing.
_MIN_BAR = 4


def progress_text(record: Mapping[str, Any] | None) -> str:
    """Return progress as text: ``download  43 %  123 MiB of 286 MiB  30 MiB/s  5 s left``."""
    if not record or not isinstance(moved := record.get("bytes"), int):
        return ""
    total, rate = record.get("total"), record.get("rate")
    parts = [str(record.get("stage") or "")]
    if isinstance(total, int) and total > 0:
        parts += [f"{100 * moved // total} %", f"{human_size(moved)} of {human_size(total)}"]
    elif moved:
        parts.append(human_size(moved))
    if isinstance(rate, int | float) and rate > 0:
        parts.append(f"{human_size(rate)}/s")
        if isinstance(total, int) and total > moved:
            parts.append(f"{human_duration(max(1.0, (total - moved) / rate))} left")
    return "  ".join(filter(None, parts))


class Bar:
    """A tqdm bar that shows progress records. If standard error is not a terminal, it prints a line each minute."""

    def __init__(self, label: str, *, disable: bool = False) -> None:
        self._label = printable(label)
        self._disable = disable
        self._printed = time.monotonic()
        self._last: dict[str, Any] = {"bytes": 0}
        self._tqdm: tqdm[Any] | None = None
        if disable or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        # A serial console reports a size of 0. tqdm would print nothing there, so pass the fallback size.
        size = shutil.get_terminal_size()
        self._tqdm = tqdm(ncols=size.columns, nrows=size.lines, bar_format="{desc}")

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a progress record: stage, bytes, total, rate."""
        self._last = dict(record)
        # The stage of some jobs begins with their name.
        label = "" if str(record.get("stage")).startswith(self._label) else f"{self._label}  "
        text = printable(f"{label}{progress_text(record)}")
        if self._tqdm is not None:
            self._draw(self._tqdm, text, record)
        elif not self._disable and time.monotonic() - self._printed > _LINE_EVERY_S:
            self._printed = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def _draw(self, bar: tqdm[Any], text: str, record: Mapping[str, Any]) -> None:
        bar.total = record.get("total")
        # The text is more important than the bar, which gets the rest of the line.
        width = min(20, shutil.get_terminal_size().columns - len(text) - 5)
        bar.bar_format = f"{{desc}}  |{{bar:{width}}}|" if bar.total and width >= _MIN_BAR else "{desc}"
        bar.n = record.get("bytes", 0)
        bar.set_description_str(text)

    def finish(self, stage: str) -> None:
        """Show the end of a job that has succeeded. All bytes of its last stage have been moved."""
        total = self._last.get("total")
        self.show(self._last | {"stage": stage, "rate": 0} | ({"bytes": total} if total else {}))

    def close(self) -> None:
        """Close the bar and leave its last state on the screen."""
        if self._tqdm is not None:
            self._tqdm.close()
