"""What became of many artifacts, for people: a line for each, then the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssvm_worker.units import human_size, printable


def told(result: Mapping[str, Any] | None) -> str | None:
    """The text of a copy of all artifacts; None of any other result."""
    if not result or "artifacts" not in result or "counts" not in result:
        return None
    rows = result["artifacts"]
    lines = [_row(each) for each in rows]
    done = sum(result["counts"].values())
    if done > len(rows):
        lines.append(f"and {done - len(rows)} more")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()) or "none"
    counts += f", {result['not_begun']} not begun" if result["not_begun"] else ""
    route = f"{result['source']} to {', '.join(result['stores'])}"
    lines.append(f"{counts}; of {result['found']} artifacts, {human_size(result['bytes'])}, from {route}")
    if result["others"]:
        lines.append(f"{result['others']} objects belong to no complete artifact, and stay where they are")
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    behind = row["error"]["message"] if "error" in row else human_size(row["bytes"]) if "bytes" in row else ""
    return printable(f"{row['outcome']:9} {row['artifact']}  {behind}").rstrip()
