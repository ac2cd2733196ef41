"""The tables of the measurements, and their section in the documentation."""

from __future__ import annotations

import os
import platform
import re
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ssvm_worker.units import human_size

from .contest import COST, Row
from .download import found
from .upload import s5cmd

KEPT = Path(__file__).parents[1] / "docs/reference/benchmarks.md"
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
_SECTION = re.compile(r"^### (\w+)$", re.MULTILINE)
HEADS = ("bench", "ours", "peer", "ratio", "target", "ok")


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table that is aligned for a terminal."""
    lines = [HEADS, *([getattr(each, head) for head in HEADS] for each in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def keep(results: Mapping[str, Sequence[Row]], runs: Mapping[str, int], kept: Path = KEPT) -> None:
    """Write the table of each benchmark and the conditions to benchmarks.md. Keep the tables of others.

    *runs*: the runs of each benchmark. The rows of the section ``cost`` come from several benchmarks. So a new row
    there replaces only the row with the same title and peer.
    """
    before, _, rest = kept.read_text().partition(_BEGIN)
    inside, _, after = rest.partition(_END)
    _, *parts = _SECTION.split(inside)
    sections = dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    for name, rows in results.items():
        earlier = _rows_in(sections.get(name, "")) if name == COST else []
        titles = {(each.bench, each.peer.partition(":")[0]): each for each in [*earlier, *rows]}
        sections[name] = f"{table(list(titles.values()))}\n\n{machine(runs.get(name, 0))}"
    text = "\n\n".join(f"### {name}\n\n{section}" for name, section in sections.items())
    kept.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def _rows_in(section: str) -> list[Row]:
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(*each, section=COST) for each in cells]


def machine(runs: int) -> str:
    """Describe the machine and the date, without host names and paths. *runs* is 0 if it differs by row."""
    now = datetime.now(UTC)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts = [
        f"{f'Medians of {runs}' if runs > 1 else 'One run each' if runs else 'Medians'}, {now:%Y-%m-%d}",
        f"{len(os.sched_getaffinity(0))} cores of {_processor()}, {human_size(memory)} of memory, all files in memory",
        f"Load average at the end {os.getloadavg()[0]:.1f}, both sides at nice {os.getpriority(os.PRIO_PROCESS, 0)}",
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, {_openssl()}",
        "Peers: " + ", ".join(filter(None, [*map(_version, _PEERS), _govc()])),
    ]
    return ". ".join(facts) + "."


def _processor() -> str:
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def _openssl() -> str:
    return " ".join(ssl.OPENSSL_VERSION.split()[:2])


_BIN = Path(sys.executable).parent
_PEERS: tuple[tuple[str, list[str]], ...] = (
    ("nginx", [found("nginx") or "nginx", "-v"]),
    ("curl", ["curl", "--version"]),
    ("aria2", ["aria2c", "--version"]),
    ("zstd", ["zstd", "--version"]),
    ("gzip", ["gzip", "--version"]),
    ("xz", ["xz", "--version"]),
    ("SeaweedFS", [str(_BIN / "weed"), "version"]),
    ("s5cmd", [str(s5cmd() or "s5cmd"), "version"]),
    ("rclone", [str(_BIN / "rclone"), "version"]),
)


def _govc() -> str:
    """Return govc's version from the module file, from which it is built."""
    match = re.search(r"govmomi v([\d.]+)", (Path(__file__).parent / "govc/go.mod").read_text())
    return f"govc {match[1]}" if match else ""


def _version(peer: tuple[str, list[str]]) -> str:
    name, command = peer
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    match = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
    return f"{name} {match[0]}" if match else ""
