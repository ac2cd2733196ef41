"""copy all: the other store gets every artifact completely or a reason, and a repetition continues."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, artifacts_below, find_manifest, write_manifest
from ssvm_worker.errors import (
    Cancelled,
    CorruptImage,
    InvalidRequest,
    StoreFull,
    StoreUnavailable,
)
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner
from tests.attempts import again, attempt
from tests.contracts.store import put
from tests.copies import content
from tests.faults import images, store_failing, store_failing_commit, store_full
from tests.grain_bench import changed, disk, restored
from tests.migrations import PLACES, SIZE, outcomes, result_of, run, theirs


def test_all(source: MemoryStore, archive: MemoryStore) -> None:
    """Every artifact arrives, backups with their packs, and the result has a line for each and the sum."""
    result = run(source, archive)

    assert content(archive) == theirs(source)
    found = find_manifest(archive, Artifact("backup", "acme", "b2", "vol1"))
    assert found
    assert restored(archive, found) == changed(disk(12), 3)
    assert set(outcomes(result).values()) == {"copied"}
    assert set(outcomes(result)) == {each.prefix for each in artifacts_below(source)}
    assert (result["found"], result["counts"], result["not_begun"], result["others"]) == (9, {"copied": 9}, 0, 2)
    packs = sum(len(data) for key, data in content(archive).items() if not key.endswith("manifest.json"))
    assert result["bytes"] == packs


def test_again(source: MemoryStore, archive: MemoryStore) -> None:
    """A repetition skips existing artifacts, and covers new and deleted ones."""
    run(source, archive)
    for key in [each.key for each in archive.list("volumes")]:
        archive.delete(key)
    result = run(source, archive)
    assert result["counts"] == {"there": 8, "copied": 1}
    assert result["bytes"] == SIZE + 3
    assert content(archive) == theirs(source)


def test_progress(source: MemoryStore, archive: MemoryStore) -> None:
    """One bar covers all artifacts: it ends full, counts the bytes, and shows how many are complete."""
    it = attempt(source, archive)
    request = parse_request(copy.Request, {"all": True, "stores": ["archive"], "prefix": "template"}, "copy")
    copy.run(request, it)
    shown = it.progress.snapshot()
    assert (shown["stage"], shown["bytes"], shown["total"]) == ("copy 6 of 6", 6 * (SIZE + 3), 6 * (SIZE + 3))
    copy.run(request, it)
    assert (it.progress.bytes, it.progress.total) == (0, 0)


def test_several_stores(source: MemoryStore, archive: MemoryStore) -> None:
    """Each named store gets all artifacts."""
    other = MemoryStore("other")
    run(source, archive, other, stores=["archive", "other"])
    assert content(other) == content(archive) == theirs(source)


def test_prefix(source: MemoryStore, archive: MemoryStore) -> None:
    """With a prefix, only artifacts below it are copied."""
    result = run(source, archive, prefix="volumes/3/")
    assert list(outcomes(result)) == ["volumes/3/v1"]
    assert {each.prefix for each in artifacts_below(archive)} == {"volumes/3/v1"}


@pytest.mark.parametrize("parallel", [1, 3, 64])
def test_move(source: MemoryStore, archive: MemoryStore, parallel: int) -> None:
    """A move of all deletes only what is complete at the target, and keeps foreign files."""
    before = theirs(source)
    result = run(source, archive, move=True, parallel=parallel, prefix="template")
    assert set(outcomes(result).values()) == {"moved"}
    assert content(archive) == {key: data for key, data in before.items() if key.startswith("template/")}
    assert [key for key in content(source) if key.startswith("template/")] == ["template/tmpl/2/half/half.raw"]


def test_one_is_damaged(source: MemoryStore, archive: MemoryStore) -> None:
    """Damage fails only its artifact; the error has all outcomes, and a move keeps the damaged one."""
    put(source, PLACES[2].key("2.raw"), b"damaged")
    with pytest.raises(CorruptImage, match="1 of 6 artifacts are not copied; The object has 7 bytes") as caught:
        run(source, archive, move=True, prefix="template")
    result = result_of(caught.value)
    assert (result["counts"], result["artifacts"][0]["artifact"]) == ({"moved": 5, "failed": 1}, "template/tmpl/2/2")
    assert result["artifacts"][0]["error"]["error"] == "CorruptImage"
    assert [each for each in content(archive) if each.startswith("template/tmpl/2/2/")] == []
    assert archive.uncommitted() == set()
    assert find_manifest(source, PLACES[2])


def test_another_in_its_place(source: MemoryStore, archive: MemoryStore) -> None:
    """Another artifact of that name is refused and stays unchanged."""
    put(archive, PLACES[0].key("0.raw"), b"another")
    write_manifest(archive, Manifest(PLACES[0], "x", (Entry("0.raw", 7, str(digest_of(b"another"))),)), Owner())
    with pytest.raises(InvalidRequest, match="1 of 9") as caught:
        run(source, archive)
    assert result_of(caught.value)["counts"] == {"failed": 1, "copied": 8}
    assert content(archive)[PLACES[0].key("0.raw")] == b"another"


def test_full(source: MemoryStore, archive: MemoryStore) -> None:
    """On a full store no further copy starts, and the result has the number of skipped artifacts."""
    full = store_full(archive, SIZE - 1, chosen=lambda key: key.endswith("/1.raw"))
    with pytest.raises(StoreFull, match="is full") as caught:
        run(source, full, parallel=1, prefix="template")
    result = result_of(caught.value)
    assert (result["counts"], result["not_begun"]) == ({"copied": 1, "failed": 1}, 4)
    assert run(source, archive)["counts"] == {"there": 1, "copied": 8}


def test_what_may_pass_decides(source: MemoryStore, archive: MemoryStore) -> None:
    """If one artifact may succeed later, the job is tried again, even if another never will."""
    put(source, PLACES[2].key("2.raw"), b"damaged")
    away = store_failing_commit(archive, chosen=lambda key: key.endswith("/4.raw"))
    with pytest.raises(StoreUnavailable, match="2 of 9"):
        run(source, away)


def test_store_that_always_fails(archive: MemoryStore) -> None:
    """A store that fails repeatedly is not tried for each of thousands of artifacts."""
    source = MemoryStore("primary")
    for number in range(100):
        entry = Entry("x.raw", 1, f"sha256:{0:064}")
        write_manifest(source, Manifest(Artifact("volume", "1", str(number)), "job-0", (entry,)), Owner())
    away = store_failing(archive, 0)
    with pytest.raises(StoreUnavailable) as caught:
        run(source, away, parallel=1)
    result = result_of(caught.value)
    assert (result["counts"], result["not_begun"]) == ({"failed": 20}, 80)


def test_goes_on_within_an_object(source: MemoryStore, archive: MemoryStore) -> None:
    """The next attempt reuses the bytes of the object in which this one stopped."""
    big = Artifact("volume", "3", "big")
    data = os.urandom(3 << 20)
    put(source, big.key("big.raw"), data)
    write_manifest(source, Manifest(big, "job-0", (Entry("big.raw", len(data), str(digest_of(data))),)), Owner())
    with pytest.raises(StoreUnavailable):
        run(source, store_failing(archive, 2 << 20, chosen=images), how={"will_resume": again})
    assert archive.uncommitted() == {big.key("big.raw")}
    opened: list[int] = []
    real = source.reader

    class Opened:
        def reader(self, key: str) -> Any:
            reader = real(key)
            if key == big.key("big.raw"):
                give = reader.open
                reader.open = lambda offset=0: (opened.append(offset), give(offset))[1]  # type: ignore[method-assign]
            return reader

        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

    run(Opened(), archive, how={"number": 2, "token": 1})  # type: ignore[arg-type]
    assert opened == [2 << 20]
    assert content(archive) == theirs(source)


def test_cancel(source: MemoryStore, archive: MemoryStore) -> None:
    """A cancel ends all copies, and nothing of unfinished artifacts is left."""
    reasons = iter([None] * 12)
    with pytest.raises(Cancelled):
        run(source, archive, how={"stop_reason": lambda: next(reasons, "user")})
    assert archive.uncommitted() == set()
    for each in content(archive):
        assert find_manifest(archive, Artifact.of_prefix(each.rpartition("/")[0]))


@pytest.mark.parametrize(
    "fields",
    [{}, {"all": True, "account": "2"}, {"all": True, "id": "2"}, {"id": "2"}, {"account": "2"}],
    ids=["nothing", "all and an account", "all and an id", "no account", "no id"],
)
def test_one_or_all(fields: dict[str, Any]) -> None:
    """A request names either one artifact or all."""
    with pytest.raises(InvalidRequest, match="give account and id, or all"):
        parse_request(copy.Request, {"stores": ["archive"]} | fields, "copy")


def test_prefix_of_one() -> None:
    """A prefix requires all."""
    with pytest.raises(InvalidRequest, match="prefix requires all"):
        parse_request(copy.Request, {"stores": ["a"], "account": "2", "id": "1", "prefix": "template"}, "copy")
