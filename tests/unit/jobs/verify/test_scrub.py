"""verify of many artifacts: the selection, the order, the rate, the findings, and what is remembered."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.cli import main
from ssvm_worker.errors import Cancelled, CorruptImage, InvalidRequest, StoreUnavailable
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.ledger.scrub_results import LocalScrubResults, ScrubResults
from ssvm_worker.ledger.scrub_results.redis import SharedScrubResults
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes
from tests.attempts import attempt
from tests.contracts.scrub_results import VerdictsContract
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server
from tests.unit.stores.s3.test_s3_store import settings_of

OWNER = Owner("job-0", 1)
IDS = ("1", "2", "2-a", "20", "3")
BODY = bytes(range(256)) * 16


class TestLocal(VerdictsContract):
    """Verdicts in this process."""

    @pytest.fixture
    def verdicts(self) -> ScrubResults:
        """Return new verdicts."""
        return LocalScrubResults()


class TestShared(VerdictsContract):
    """Verdicts in a broker."""

    @pytest.fixture
    def verdicts(self, broker: Broker) -> ScrubResults:
        """Return new verdicts."""
        return SharedScrubResults(broker.url, prefix=broker.prefix)


class Watched(LocalScrubResults):
    """A store that records the order in which artifacts were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def note(self, store: str, place: str, *rest: Any) -> None:
        self.read.append(place.rpartition("/")[2])
        super().note(store, place, *rest)


class Away(LocalScrubResults):
    """A broker that is absent."""

    def note(self, *_: Any) -> None:
        raise StoreUnavailable("The broker cannot be reached")


def place(id_: str) -> Artifact:
    return Artifact("template", "acme", id_)


def fill(store: Store) -> Any:
    """Store five templates, of which some ids are prefixes of others."""
    for id_ in IDS:
        put_bytes(store, place(id_).key("x.raw"), BODY, OWNER)
        write_manifest(store, Manifest(place(id_), "j", (Entry("x.raw", len(BODY), str(digest_of(BODY))),)), OWNER)
    return store


def damage(store: Store, id_: str) -> None:
    put_bytes(store, place(id_).key("x.raw"), b"?" + BODY[1:], OWNER)


def scrub(store: Store, verdicts: ScrubResults | None = None, fields: Any = None, **given: Any) -> dict[str, Any]:
    request = parse_request(verify.Request, fields or {"all": True}, "verify")
    return verify.run(request, attempt(store, scrub_results=verdicts or LocalScrubResults(), **given))


@pytest.fixture
def store() -> MemoryStore:
    """Return a store with five templates."""
    return fill(MemoryStore("primary"))  # type: ignore[no-any-return]


@pytest.fixture(params=["file", "s3"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return the same in a directory and in S3."""
    if request.param == "file":
        return fill(FileStore("primary", tmp_path))  # type: ignore[no-any-return]
    server: S3Server = request.getfixturevalue("s3_server")
    return fill(S3Store("primary", server.make_bucket(), "", settings_of(server)))  # type: ignore[no-any-return]


def test_all(real: Store) -> None:
    """All artifacts are read, exactly the damaged ones are named, and the first does not end the run."""
    assert scrub(real)["artifacts"] == 5
    damage(real, "1")
    real.delete(place("3").key("x.raw"))
    with pytest.raises(CorruptImage, match=r"2 artifacts are damaged, of 5.*acme/1/x.raw has.*acme/3/x.raw is missing"):
        scrub(real)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    """An object that cannot be opened is a finding of its artifact, and the following ones are read."""
    store = fill(FileStore("primary", tmp_path))
    path = tmp_path / place("1").key("x.raw")
    path.unlink()
    path.symlink_to("/etc/passwd")
    damage(store, "3")
    with pytest.raises(CorruptImage, match=r"2 artifacts are damaged, of 5.*acme/1.*acme/3/x.raw has"):
        scrub(store)


@pytest.mark.parametrize("facts", [{"disks": 5}, {"disks": [1]}, {"format": []}, {"virtual_size": "x"}])
def test_facts_that_make_no_sense(facts: dict[str, Any]) -> None:
    """Facts of a wrong type are at most a finding of their artifact, and the others are read."""
    store = fill(MemoryStore("primary"))
    odd = Artifact("backup", "acme", "b", "v")
    put_bytes(store, odd.key("x.raw"), BODY, OWNER)
    entry = Entry("x.raw", len(BODY), str(digest_of(BODY)), "disk", facts)
    write_manifest(store, Manifest(odd, "j", (entry,), facts=facts), OWNER)
    damage(store, "3")
    with pytest.raises(CorruptImage, match=r"of 6.*acme/3/x.raw has"):
        scrub(store)


def test_unreadable_manifest(store: MemoryStore) -> None:
    """A manifest that cannot be read is a finding of its artifact."""
    put_bytes(store, place("2").key("manifest.json"), b"{", OWNER)
    with pytest.raises(CorruptImage, match=r"1 artifact is damaged.*acme/2/manifest.json: The manifest cannot"):
        scrub(store)


@pytest.mark.parametrize(("sample", "count"), [("2", 2), ("99", 5), ("20%", 1), ("21%", 2), ("100%", 5), ("0.1%", 1)])
def test_sample(store: MemoryStore, sample: str, count: int) -> None:
    """A sample has the requested number, in the order of the paths, and a percentage gives at least one."""
    verdicts = Watched()
    assert scrub(store, verdicts, {"sample": sample})["artifacts"] == count
    assert verdicts.read == [each for each in IDS if each in verdicts.read]


def test_sample_reaches_all(store: MemoryStore) -> None:
    """Any artifact may be in a sample."""
    verdicts = Watched()
    for _ in itertools.takewhile(lambda _: len(set(verdicts.read)) < 5, range(1000)):
        scrub(store, verdicts, {"sample": "1"})
    assert set(verdicts.read) == set(IDS)


def test_oldest(store: MemoryStore) -> None:
    """Unverified artifacts come first, then the least recently read; after some runs all were read."""
    verdicts = Watched()
    for _ in range(5):
        scrub(store, verdicts, {"oldest": 2})
    assert sorted(verdicts.read[:5]) == sorted(IDS)
    assert verdicts.read[5:] == verdicts.read[:5]


def test_prefix(store: MemoryStore) -> None:
    """With a prefix, only artifacts below it are read."""
    other = Artifact("volume", "9", "1")
    put_bytes(store, other.key("x.raw"), BODY, OWNER)
    write_manifest(store, Manifest(other, "j", (Entry("x.raw", len(BODY), str(digest_of(BODY))),)), OWNER)
    assert scrub(store, fields={"all": True, "prefix": "volumes/9/"})["artifacts"] == 1


def test_findings_stay(store: MemoryStore) -> None:
    """A finding, also of a single verification, is kept until the artifact is intact or deleted."""
    verdicts = LocalScrubResults()
    damage(store, "1")
    damage(store, "2")
    with pytest.raises(CorruptImage):
        scrub(store, verdicts)
    assert [each.place for each in verdicts.findings()] == [place("1").prefix, place("2").prefix]
    put_bytes(store, place("1").key("x.raw"), BODY, OWNER)
    scrub(store, verdicts, {"account": "acme", "id": "1"})
    request = parse_request(delete.Request, {"account": "acme", "id": "2"}, "delete")
    delete.run(request, attempt(store, scrub_results=verdicts))
    assert list(verdicts.findings()) == []


def test_forgets_what_is_gone(store: MemoryStore) -> None:
    """After a complete run, manually deleted artifacts are forgotten."""
    verdicts = LocalScrubResults()
    scrub(store, verdicts)
    for each in list(store.list(place("1").prefix)):
        store.delete(each.key)
    scrub(store, verdicts)
    assert verdicts.times("primary", [place("1").prefix, place("2").prefix])[0] == 0


def test_deleted_meanwhile(store: MemoryStore) -> None:
    """An artifact that is deleted while it is read is no finding."""

    class Deleting(MemoryStore):
        def reader(self, key: str) -> Any:
            for each in list(self.list(key.rpartition("/")[0])):
                if not each.key.endswith(".json") or not key.endswith(".json"):
                    self.delete(each.key)
            return super().reader(key)

    assert scrub(fill(Deleting("primary")))["artifacts"] == 0


@pytest.mark.parametrize("shared", [False, True])
def test_goes_on(store: MemoryStore, broker: Broker, shared: bool) -> None:
    """The next attempt continues where the last one stopped, and keeps its findings."""
    verdicts: ScrubResults = SharedScrubResults(broker.url, prefix=broker.prefix) if shared else LocalScrubResults()
    damage(store, "1")

    def stop() -> str | None:
        return "shutdown" if "primary:template/tmpl/acme/2-a" in noted() else None

    def noted() -> set[str]:
        places = [place(id_).prefix for id_ in IDS]
        return {f"primary:{each}" for each, when in zip(places, verdicts.times("primary", places), strict=True) if when}

    with pytest.raises(Cancelled):
        scrub(store, verdicts, stop_reason=stop)
    with pytest.raises(CorruptImage, match=f"1 artifact is damaged, of {5 - len(noted())} that were read"):
        scrub(store, verdicts, number=2)
    assert len(noted()) == 5


def test_rate(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all artifacts together stay below the requested rate."""
    waited: list[float] = []
    monkeypatch.setattr("ssvm_worker.jobs.attempt.Attempt.wait", lambda _, seconds: waited.append(seconds))
    scrub(store, fields={"all": True, "rate": "1KiB/s"})
    assert max(waited) > 5 * len(BODY) / 1024 - 2


def test_without_broker(store: MemoryStore) -> None:
    """Without a memory, artifacts are read anyway, and the result says so."""
    assert scrub(store, Away())["recorded"] is False


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give account and id, or one of"),
        ({"account": "a"}, "give account and id, or one of"),
        ({"account": "a", "id": "1", "all": True}, "give account and id, or one of"),
        ({"sample": "5%", "oldest": 5}, "give account and id, or one of"),
        ({"account": "a", "id": "1", "prefix": "volumes"}, "prefix requires"),
        ({"sample": "101%"}, "sample: must be a number, or a percentage"),
        ({"sample": "0"}, "sample: must be a number, or a percentage"),
        ({"oldest": -1}, "oldest"),
        ({"all": True, "rate": "fast"}, "rate: must be a number of bytes"),
        ({"all": True, "rate": "0"}, "rate: must be more than 0"),
    ],
)
def test_refused(fields: dict[str, Any], said: str) -> None:
    """An ambiguous request is refused with the reason."""
    with pytest.raises(InvalidRequest, match=said):
        parse_request(verify.Request, fields, "verify")


@pytest.fixture
def ssvm(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    """Return the command line with a store in a directory, and a broker."""
    (tmp_path / "s").mkdir()
    fill(FileStore("primary", tmp_path / "s"))
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{tmp_path}/s")
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)
    logging.getLogger().handlers.clear()

    def run(*argv: str) -> tuple[int, Any]:
        status = main([*argv, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_command(ssvm: Callable[..., tuple[int, Any]], tmp_path: Path) -> None:
    """The command reads all artifacts, ends with 1 on damage, and lists the known findings."""
    assert ssvm("verify", "--all", "--rate", "1GiB/s")[1]["artifacts"] == 5
    assert ssvm("verify", "--findings") == (0, [])
    times = ssvm("verify", "--times", "template/tmpl/acme")[1]
    assert [each["artifact"][19:] for each in times if each["verified"]] == sorted(IDS, key=lambda each: f"{each}/")
    damage(FileStore("primary", tmp_path / "s"), "20")
    status, error = ssvm("verify", "--oldest", "5")
    assert (status, error["error"]) == (1, "CorruptImage")
    status, rows = ssvm("verify", "--findings")
    assert status == 1
    assert rows[0]["artifact"] == "template/tmpl/acme/20"
    assert "instead of sha256" in rows[0]["findings"][0]
