"""Runs one target under atheris. libFuzzer ends the process. Arguments: TARGET SECONDS FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ssvm_worker"]):
    from ssvm_worker.errors import WorkerError

    from .targets import TARGETS

#: Bytes of an input, seconds for an input, and MiB of the process. The process starts with about 250 MiB.
LIMITS = ("-max_len=4096", "-timeout=10", "-rss_limit_mb=1024")

name, seconds, folder = sys.argv[1:]
target = TARGETS[name]
corpus = Path(folder, "corpus")
corpus.mkdir()
for number, seed in enumerate(target.seeds):
    (corpus / str(number)).write_bytes(seed)


def once(data: bytes) -> None:
    """Run the target. A WorkerError is a valid result."""
    try:
        target.run(data)
    except WorkerError:
        return


options = [*LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={folder}/found-", str(corpus)]
atheris.Setup([sys.argv[0], *options], once)
atheris.Fuzz()
