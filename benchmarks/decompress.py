"""Download of a compressed image with two digests, compared with a pipe of curl, the tool, tee and sha256sum."""

from __future__ import annotations

import hashlib
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from ssvm_worker.units import KiB, MiB

from .contest import Contender, Row, contest, left_out
from .download import Site, found, ours, serving, taker

_IMAGE = "image.raw"
#: The name in the table, the tool and its options. Higher levels of gzip and xz take minutes for each GiB.
#: `xz -T2` writes several blocks, as xz does by default since 5.6. `-T1` writes one block.
_PACKED = (
    (".zst", "zstd", ("-3",)),
    (".gz", "gzip", ("-1",)),
    (".xz of blocks", "xz", ("-0", "-T2")),
    (".xz of one block", "xz", ("-0", "-T1")),
)
_BLOCK = 64 * KiB


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure each format over plain HTTP."""
    nginx, curl = found("nginx"), found("curl")
    if not nginx or not curl:
        return [left_out("decompress", "nginx and curl are not installed")]
    (www := scratch / "www").mkdir()
    _write_image(scratch / _IMAGE, size)
    rows = []
    for number, (kind, tool, options) in enumerate(_PACKED):
        if program := found(tool):
            packed = www / f"{_IMAGE}{kind.partition(' ')[0]}"
            _pack([program, *options], scratch / _IMAGE, packed)
            (root := scratch / str(number)).mkdir()
            (root / "www").symlink_to(www)
            with packed.open("rb") as file, serving(nginx, root, packed.name, _digest(file)) as site:
                contenders = [ours(site, site.plain), _pipe(site, curl, program)]
                rows += contest(f"decompress {kind}", contenders, size, runs)
            packed.unlink()
        else:
            rows.append(left_out(f"decompress {kind}", f"{tool} is not installed"))
    return rows


def _digest(file: BinaryIO) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _pipe(site: Site, curl: str, tool: str) -> Contender:
    """Return the pipe that an administrator would type. It prints the digest of the image."""
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
    """Write blocks of which a quarter is noise and the rest words, without repetition within a window."""
    generator = random.Random(1)
    words = [generator.randbytes(generator.randint(1, 5)).hex().encode() for _ in range(4000)]
    text = b" ".join(generator.choices(words, k=2 * MiB))
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK):
            at = generator.randrange(len(text) - _BLOCK)
            block = generator.randbytes(_BLOCK) if start // _BLOCK % 4 == 0 else text[at : at + _BLOCK]
            file.write(block[: size - start])
