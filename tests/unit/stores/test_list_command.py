"""`ssvm list` and `stat`: their output for many artifacts, damaged artifacts, and unreadable stores."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.cli import main
from ssvm_worker.cli.store import list_artifacts, read_artifacts
from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.stores import open_store
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.sorted_listing import in_order
from ssvm_worker.streaming.interfaces import Owner, Store, StoredObject
from ssvm_worker.streaming.pipeline import put_bytes
from tests.faults import store_unreachable
from tests.neighbours import free_port
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import FaultyS3

OWNER = Owner("j", 1)
Ssvm = Callable[..., tuple[int, str]]


def fill(store: Store, count: int) -> Any:
    for number in range(count):
        artifact = Artifact("template", "acme", f"t{number}")
        write_manifest(store, Manifest(artifact, "j", (Entry("x", 5, ""),)), OWNER)
    return store


@pytest.fixture
def ssvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ssvm:
    """Return a function that runs a command on a store in a directory, and returns status and output."""
    (tmp_path / "s").mkdir()
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{tmp_path}/s")

    def run(*argv: str) -> tuple[int, str]:
        return main(list(argv)), capsys.readouterr().out

    return run


def test_many(ssvm: Ssvm, tmp_path: Path) -> None:
    """All artifacts are listed in the order of their paths, as a table and as JSON."""
    fill(FileStore("primary", tmp_path / "s"), 100)
    status, text = ssvm("list")
    lines = text.splitlines()
    assert (status, len(lines), lines[0].split()) == (0, 101, ["artifact", "kind", "size", "objects", "created"])
    assert len({line.index("template  ") for line in lines[1:]}) == 1
    places = [each["artifact"] for each in json.loads(ssvm("list", "--json", "--details")[1])]
    assert places == [each["artifact"] for each in json.loads(ssvm("list", "--json")[1])]
    assert places == sorted(places, key=lambda each: f"{each}/")
    assert places == [line.split()[0] for line in lines[1:]]


def test_values_without_manifests() -> None:
    """Without its manifests, a list has the same kinds, sizes and numbers of objects as with them."""
    store = MemoryStore("primary")
    artifacts = {
        Artifact("template", "acme", "t"): ("t.qcow2", "template.properties"),
        Artifact("iso", "acme", "i"): ("i.iso", "template.properties"),
        Artifact("volume", "acme", "v"): ("v.raw", "volume.properties"),
        Artifact("backup", "acme", "b", "vol"): ("b.ovf", "b-disk0.vmdk", "b.mf"),
    }
    for artifact, names in artifacts.items():
        for name in names:
            put_bytes(store, artifact.key(name), name.encode(), OWNER)
        entries = tuple(Entry(name, len(name), "") for name in names)
        write_manifest(store, Manifest(artifact, "j", entries), OWNER)
    expected = list(read_artifacts(store, ""))
    # These are no artifacts: no manifest yet, shared packs, and places outside the layout.
    for key in (
        "template/tmpl/acme/x/manifest.draft.json",
        "template/tmpl/acme/y/deeper/manifest.json",
        "snapshots/acme/vol/_packs/manifest.json",
        "other/manifest.json",
        "manifest.json",
    ):
        put_bytes(store, key, b"1", OWNER)
    names = ("artifact", "kind", "size", "objects")
    rows = [[[row[name] for name in names] for row in rows] for rows in (expected, list_artifacts(store, ""))]
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(artifacts)


@pytest.mark.parametrize("command", [("list",), ("cleanup", "--dry-run")], ids=" ".join)
def test_requests_do_not_grow_with_the_artifacts(
    ssvm: Ssvm,
    broker: Broker,
    s3_bucket: str,
    faulty_s3: FaultyS3,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    """A command over a whole S3 store sends requests for each page of its list, and none for each artifact."""
    values = {"access_key": S3Server.access_key, "secret_key": S3Server.secret_key}
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_STORES__PRIMARY__ENDPOINT", faulty_s3.endpoint)
    for name, value in values.items():
        monkeypatch.setenv(f"SSVM_STORES__PRIMARY__{name.upper()}", value)
    counts = []
    for count in (5, 40):
        prefix = f"requests-{command[0]}-{count}"
        monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"s3://{s3_bucket}/{prefix}")
        fill(open_store("primary", f"s3://{s3_bucket}/{prefix}", endpoint=faulty_s3.endpoint, **values), count)
        faulty_s3.calls.clear()
        status, text = ssvm(*command, "--json")
        assert status == 0
        counts.append(len(faulty_s3.calls))
    assert counts[0] == counts[1]
    assert command != ("list",) or len(json.loads(text)) == 40


def test_none(ssvm: Ssvm) -> None:
    """An empty store is reported as empty, without an error."""
    assert ssvm("list") == (0, "no artifacts\n")
    assert ssvm("list", "--json") == (0, "[]\n")


def test_damaged_manifest(ssvm: Ssvm, tmp_path: Path) -> None:
    """With --details, an artifact with an unreadable manifest is listed so, and the status is 1."""
    store = fill(FileStore("primary", tmp_path / "s"), 2)
    put_bytes(store, "template/tmpl/acme/t0/manifest.json", b"{", OWNER)
    status, text = ssvm("list", "--json", "--details")
    assert status == 1
    assert [each["kind"] for each in json.loads(text)] == ["unreadable", "template"]


@pytest.mark.parametrize("command", [("list",), ("stat", "template/tmpl/acme/t0"), ("verify", "--all"), ("stores",)])
def test_store_is_away(ssvm: Ssvm, tmp_path: Path, command: tuple[str, ...]) -> None:
    """A missing directory, as without its mount, is a temporary error, never an empty list."""
    (tmp_path / "s").rmdir()
    status, text = ssvm(*command)
    assert status == 75
    assert "no artifacts" not in text


@pytest.mark.parametrize(("wrong", "expected"), [("keys", 1), ("port", 75), ("bucket", 1)])
def test_s3_is_away(
    ssvm: Ssvm, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, wrong: str, expected: int
) -> None:
    """An unavailable S3 server or a missing bucket is an error too."""
    bucket = "no-such-bucket" if wrong == "bucket" else s3_server.make_bucket()
    endpoint = f"http://127.0.0.1:{free_port()}" if wrong == "port" else s3_server.endpoint
    secret = "wrong" if wrong == "keys" else s3_server.secret_key
    for name, value in (
        ("URL", f"s3://{bucket}"),
        ("ENDPOINT", endpoint),
        ("ACCESS_KEY", s3_server.access_key),
        ("SECRET_KEY", secret),
    ):
        monkeypatch.setenv(f"SSVM_STORES__PRIMARY__{name}", value)
    status, text = ssvm("list", "--json")
    assert status == expected
    assert json.loads(text)["error"].startswith("Store") or json.loads(text)["error"] == "ObjectNotFound"


def test_store_that_goes_away() -> None:
    """A store that fails after the listing is an error, not a list of unreadable artifacts."""
    with pytest.raises(StoreUnavailable):
        list(read_artifacts(store_unreachable(fill(MemoryStore("primary"), 3), "reader"), ""))


def test_deleted_meanwhile() -> None:
    """An artifact that is deleted between its listing and its reading is not listed."""

    class Deleting(MemoryStore):
        def reader(self, key: str) -> Any:
            self.delete("template/tmpl/acme/t1/manifest.json")
            return super().reader(key)

    rows = list(read_artifacts(fill(Deleting("primary"), 3), ""))
    assert [each["artifact"][-2:] for each in rows] == ["t0", "t2"]


@pytest.mark.parametrize("count", [0, 1, 24_999, 25_000, 25_001, 60_000])
def test_in_order(count: int) -> None:
    """A listing in any order is sorted by key and complete, for any length."""
    objects = [StoredObject(f"a/{number:05}", number, modified=number / 3) for number in range(count)]
    mixed = random.Random(1).sample(objects, count)
    assert list(in_order(mixed)) == objects


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000 + "]" * 100_000, id="nested deep"),
        pytest.param(" " * (17 << 20), id="too large"),
        pytest.param('{"version": 99}', id="newer"),
        pytest.param("{}", id="empty"),
        pytest.param(None, id="link"),
    ],
)
def test_one_odd_manifest(ssvm: Ssvm, tmp_path: Path, text: str | None) -> None:
    """One unreadable manifest is one row, the others are listed and verified, and the status is 1."""
    fill(FileStore("primary", tmp_path / "s"), 3)
    path = tmp_path / "s/template/tmpl/acme/t1/manifest.json"
    path.unlink()
    path.write_text(text) if text is not None else path.symlink_to("/etc/passwd")
    status, table = ssvm("list", "--json", "--details")
    rows = {each["artifact"].rpartition("/")[2]: each["kind"] for each in json.loads(table)}
    assert (status, rows.pop("t1", "unreadable")) == (1 if "unreadable" in table else 0, "unreadable")
    assert rows == {"t0": "template", "t2": "template"}
    status, shown = ssvm("verify", "--all", "--json")
    error = json.loads(shown)
    assert (status, error["error"]) == (1, "CorruptImage")
    assert {"t0", "t2"} <= {each.rpartition("/")[2] for each in error["where"].split(", ")}
    assert "delete" not in error["message"]
