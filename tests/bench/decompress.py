"""Download of a compressed image, both digests kept, against curl, the format's own tool, tee and sha256sum."""

from __future__ import annotations

import hashlib
import random
import shlex
import subprocess
import sys
from pathlib import Path

from ssvm_worker.units import KiB, MiB

from .contest import Contender, Row, contest, left_out
from .download import Site, found, ours, serving, taker

_IMAGE = "image.raw"
#: The suffix, the tool and its level: the first ones of gzip and xz, as the higher take minutes a GiB.
_TOOLS = (("zst", "zstd", "-3"), ("gz", "gzip", "-1"), ("xz", "xz", "-0"))
_BLOCK = 64 * KiB


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """One row for each format, plain HTTP."""
    nginx, curl = found("nginx"), found("curl")
    if not nginx or not curl:
        return [left_out("decompress", "nginx and curl are not installed")]
    (www := scratch / "www").mkdir()
    _write_image(scratch / _IMAGE, size)
    rows = []
    for suffix, tool, level in _TOOLS:
        if program := found(tool):
            packed = www / f"{_IMAGE}.{suffix}"
            _pack([program, level], scratch / _IMAGE, packed)
            rows += _compare(nginx, scratch, packed, [curl, program], size, runs)
            packed.unlink()
        else:
            rows.append(left_out(f"decompress {suffix}", f"{tool} is not installed"))
    return rows


def _compare(nginx: str, scratch: Path, packed: Path, tools: list[str], size: int, runs: int) -> list[Row]:
    with packed.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    (root := scratch / packed.suffix.strip(".")).mkdir()
    (root / "www").symlink_to(packed.parent)
    with serving(nginx, root, packed.name, digest) as site:
        what = f"decompress {packed.suffix}"
        return contest(what, [ours(site, site.plain), _pipe(site, *tools)], size, runs)


def _pipe(site: Site, curl: str, tool: str) -> Contender:
    """What an administrator would type; the digest that it prints is that of the image."""
    image = site.root / "out" / _IMAGE
    fetch = shlex.join([curl, "-sS", "--fail", site.plain])
    command = f"{fetch} | {shlex.join([tool, '-d', '-c'])} | tee {shlex.quote(str(image))} | sha256sum"
    name = f"curl, {Path(tool).name} -d, tee, sha256sum"
    return Contender(name, ["/bin/sh", "-c", command], taker(image.parent, _IMAGE), target=1.2)


def _pack(command: list[str], image: Path, packed: Path) -> None:
    print(f"  packing {packed.suffix}", file=sys.stderr, flush=True)
    with image.open("rb") as source, packed.open("wb") as target:
        subprocess.run([*command, "-c"], stdin=source, stdout=target, check=True)


def _write_image(path: Path, size: int) -> None:
    """A quarter noise and the rest words, in blocks; nothing repeats within a window."""
    made = random.Random(1)
    words = [made.randbytes(made.randint(1, 5)).hex().encode() for _ in range(4000)]
    text = b" ".join(made.choices(words, k=2 * MiB))
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK):
            at = made.randrange(len(text) - _BLOCK)
            block = made.randbytes(_BLOCK) if start // _BLOCK % 4 == 0 else text[at : at + _BLOCK]
            file.write(block[: size - start])
