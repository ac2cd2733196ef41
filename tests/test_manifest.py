"""The manifest: an artifact exists if its manifest does, and a draft is the journal until then."""

from __future__ import annotations

import json

import pytest

from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.keys import DRAFT, MANIFEST, Artifact
from ssvm_worker.manifest import (
    Entry,
    Manifest,
    discard,
    find_manifest,
    read_draft,
    read_manifest,
    write_draft,
    write_manifest,
)
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stream import put_bytes
from tests.contracts.store import ME, OTHER, fill, keys

TEMPLATE = Artifact("template", "2", "201")
NEIGHBOUR = Artifact("template", "2", "2010")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def sample() -> Manifest:
    """A manifest with all its fields in use."""
    entry = Entry("disk.qcow2", 7, "sha256:00", facts={"format": "qcow2", "virtual_size": 1 << 40})
    return Manifest(
        TEMPLATE, "job-1", (entry,), {"url": "http://x/Ü.qcow2"}, {"quiesced": False}, created="2026-11-23T07:00:00Z"
    )


def test_json_round_trip() -> None:
    """What is written is read back the same, as readable JSON."""
    data = sample().to_json()
    assert Manifest.from_json(data, "here") == sample()
    assert "Ü" in data.decode()
    assert data.endswith(b"}\n")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(sample().to_json()[:-20], id="cut"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="a string"),
        pytest.param(b"{}", id="no fields"),
        pytest.param(b'{"kind": "template", "account": "2", "id": "3", "volume": "", "objects": 1}', id="no list"),
        pytest.param(sample().to_json().replace(b'"kind"', b'"kin"'), id="half an artifact"),
        pytest.param(sample().to_json().replace(b'"key"', b'"kee"'), id="an object without key"),
        pytest.param(sample().to_json().replace(b'"size"', b'"bulk"'), id="unknown field of an entry"),
        pytest.param(sample().to_json().replace(b'"job_id"', b'"job"'), id="unknown field"),
        pytest.param(b"\xff\xfe\x00", id="not UTF-8"),
    ],
)
def test_broken_manifest(data: bytes) -> None:
    """Whatever is no manifest says so, and where it lies."""
    with pytest.raises(CorruptImage, match="primary:x"):
        Manifest.from_json(data, "primary:x")


def test_entries_are_replaced_by_name() -> None:
    """An entry takes the place of one of the same name; the manifest it came from is not changed."""
    first = sample()
    second = first.with_entry(Entry("disk.qcow2", 9, "sha256:11")).with_entry(Entry("b", 1, "sha256:22"))
    assert [each.size for each in second.entries] == [9, 1]
    assert (second.size, first.size) == (10, 7)
    assert (second.entry("b"), second.entry("c")) == (second.entries[1], None)


def test_artifact_exists_with_its_manifest(store: MemoryStore) -> None:
    """Objects alone are no artifact; with the manifest they are."""
    put_bytes(store, TEMPLATE.key("disk.qcow2"), b"content", ME)
    assert find_manifest(store, TEMPLATE) is None
    with pytest.raises(ObjectNotFound, match="template/tmpl/2/201"):
        read_manifest(store, TEMPLATE)
    write_manifest(store, sample(), ME)
    assert read_manifest(store, TEMPLATE) == sample()


def test_draft_goes_when_the_manifest_stands(store: MemoryStore) -> None:
    """A draft can be read until the manifest is written, and is no manifest."""
    write_draft(store, sample(), ME)
    assert read_draft(store, TEMPLATE) == sample()
    assert find_manifest(store, TEMPLATE) is None
    write_manifest(store, sample(), ME)
    assert (read_draft(store, TEMPLATE), keys(store)) == (None, [TEMPLATE.key(MANIFEST)])


def test_broken_draft_counts_as_none(store: MemoryStore) -> None:
    """A draft that cannot be read costs a fresh start, not the job."""
    put_bytes(store, TEMPLATE.key(DRAFT), b"{", ME)
    assert read_draft(store, TEMPLATE) is None


def test_broken_manifest_is_not_a_missing_one(store: MemoryStore) -> None:
    """A manifest that cannot be read is told, for the artifact may be worth saving."""
    put_bytes(store, TEMPLATE.key(MANIFEST), b"{", ME)
    with pytest.raises(CorruptImage):
        find_manifest(store, TEMPLATE)


def test_objects_are_listed_with_their_keys() -> None:
    """Whoever reads the JSON alone finds every object."""
    fields = json.loads(sample().to_json())
    assert [each["key"] for each in fields["objects"]] == ["template/tmpl/2/201/disk.qcow2"]
    assert (fields["kind"], fields["account"], fields["id"]) == ("template", "2", "201")


def test_discard_removes_an_unfinished_artifact(store: MemoryStore) -> None:
    """Objects, draft and parts of an unfinished artifact go; a neighbour whose id begins alike is untouched."""
    put_bytes(store, TEMPLATE.key("disk.qcow2"), b"1", ME)
    write_draft(store, sample(), ME)
    fill(store.writer(TEMPLATE.key("disk2.qcow2"), owner=OTHER), b"2")
    put_bytes(store, NEIGHBOUR.key("disk.qcow2"), b"3", ME)
    discard(store, TEMPLATE)
    assert (keys(store), store.uncommitted()) == ([NEIGHBOUR.key("disk.qcow2")], set())


def test_discard_keeps_a_complete_artifact(store: MemoryStore) -> None:
    """What has its manifest is kept; only parts go."""
    put_bytes(store, TEMPLATE.key("disk.qcow2"), b"1", ME)
    write_manifest(store, sample(), ME)
    fill(store.writer(TEMPLATE.key("disk.qcow2"), owner=OTHER), b"2")
    discard(store, TEMPLATE)
    assert keys(store) == [TEMPLATE.key("disk.qcow2"), TEMPLATE.key(MANIFEST)]
    assert store.uncommitted() == set()
