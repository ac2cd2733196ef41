"""The tables of the measurements, and their section in the documentation."""

from __future__ import annotations

import dataclasses
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

from .contest import Row
from .download import found
from .upload import s5cmd

KEPT = Path(__file__).parents[1] / "docs/reference/benchmarks.md"
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
_SECTION = re.compile(r"^### (\w+)$", re.MULTILINE)
_HEADS = ("bench", "ours", "peer", "ratio", "target", "ok")


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table that is aligned for a terminal."""
    lines = [_HEADS, *(dataclasses.astuple(each) for each in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def keep(results: Mapping[str, Sequence[Row]], runs: int, kept: Path = KEPT) -> None:
    """Write the table of each benchmark and the conditions to benchmarks.md. Keep the tables of others."""
    before, _, rest = kept.read_text().partition(_BEGIN)
    inside, _, after = rest.partition(_END)
    _, *parts = _SECTION.split(inside)
    sections = dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    conditions = machine(runs)
    sections |= {name: f"{table(rows)}\n\n{conditions}" for name, rows in results.items()}
    text = "\n\n".join(f"### {name}\n\n{section}" for name, section in sections.items())
    kept.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def machine(runs: int) -> str:
    """Describe the machine and the date, without host names and paths."""
    now = datetime.now(UTC)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts = [
        f"Medians of {runs}, {now:%Y-%m-%d}",
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
