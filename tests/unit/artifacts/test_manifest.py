"""An artifact exists if its manifest exists, and a draft of the manifest is the journal until then."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ssvm_worker.artifacts.layout import DRAFT, MANIFEST, Artifact
from ssvm_worker.artifacts.manifest import (
    Entry,
    Manifest,
    discard,
    find_manifest,
    read_draft,
    read_manifest,
    write_draft,
    write_manifest,
)
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.pipeline import put_bytes
from tests.contracts.store import ME, OTHER, fill, keys

TEMPLATE = Artifact("template", "2", "201")
NEIGHBOUR = Artifact("template", "2", "2010")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def sample() -> Manifest:
    """Return a manifest that uses all its fields."""
    entry = Entry("disk.qcow2", 7, "sha256:00", facts={"format": "qcow2", "virtual_size": 1 << 40})
    return Manifest(
        TEMPLATE, "job-1", (entry,), {"url": "http://x/Ü.qcow2"}, {"quiesced": False}, created="2026-11-23T07:00:00Z"
    )


def test_json_round_trip() -> None:
    """A manifest is written as readable JSON, and reading it returns an equal manifest."""
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
        pytest.param(sample().to_json().replace(b'"size"', b'"bulk"'), id="an object without size"),
        pytest.param(sample().to_json().replace(b'"job_id"', b'"job"'), id="a field missing"),
        pytest.param(b"\xff\xfe\x00", id="not UTF-8"),
    ],
)
def test_broken_manifest(data: bytes) -> None:
    """The error of an invalid manifest says so, and names its location."""
    with pytest.raises(CorruptImage, match="primary:x"):
        Manifest.from_json(data, "primary:x")


def test_entries_are_replaced_by_name() -> None:
    """A new entry replaces the entry of the same name, and the original manifest is unchanged."""
    first = sample()
    second = first.with_entry(Entry("disk.qcow2", 9, "sha256:11")).with_entry(Entry("b", 1, "sha256:22"))
    assert [each.size for each in second.entries] == [9, 1]
    assert (second.size, first.size) == (10, 7)
    assert (second.entry("b"), second.entry("c")) == (second.entries[1], None)


def test_artifact_exists_with_its_manifest(store: MemoryStore) -> None:
    """Objects without a manifest are no artifact; with the manifest they are one."""
    put_bytes(store, TEMPLATE.key("disk.qcow2"), b"content", ME)
    assert find_manifest(store, TEMPLATE) is None
    with pytest.raises(ObjectNotFound, match="template/tmpl/2/201"):
        read_manifest(store, TEMPLATE)
    write_manifest(store, sample(), ME)
    assert read_manifest(store, TEMPLATE) == sample()


def test_draft_goes_when_the_manifest_stands(store: MemoryStore) -> None:
    """A draft can be read until the manifest is written, and does not count as a manifest."""
    write_draft(store, sample(), ME)
    assert read_draft(store, TEMPLATE) == sample()
    assert find_manifest(store, TEMPLATE) is None
    write_manifest(store, sample(), ME)
    assert (read_draft(store, TEMPLATE), keys(store)) == (None, [TEMPLATE.key(MANIFEST)])


def test_broken_draft_counts_as_none(store: MemoryStore) -> None:
    """An unreadable draft causes a fresh start, and does not fail the job."""
    put_bytes(store, TEMPLATE.key(DRAFT), b"{", ME)
    assert read_draft(store, TEMPLATE) is None


def test_broken_manifest_is_not_a_missing_one(store: MemoryStore) -> None:
    """An unreadable manifest is reported, not treated as missing, because the artifact may be recoverable."""
    put_bytes(store, TEMPLATE.key(MANIFEST), b"{", ME)
    with pytest.raises(CorruptImage):
        find_manifest(store, TEMPLATE)


def test_objects_are_listed_with_their_keys() -> None:
    """The JSON lists every object with its full key."""
    fields = json.loads(sample().to_json())
    assert [each["key"] for each in fields["objects"]] == ["template/tmpl/2/201/disk.qcow2"]
    assert (fields["kind"], fields["account"], fields["id"]) == ("template", "2", "201")


def test_discard_removes_an_unfinished_artifact(store: MemoryStore) -> None:
    """A discard deletes objects, draft and parts of an unfinished artifact, but no neighbour with a similar id."""
    put_bytes(store, TEMPLATE.key("201.qcow2"), b"1", ME)
    write_draft(store, sample(), ME)
    fill(store.writer(TEMPLATE.key("201-disk1.vmdk"), owner=OTHER), b"2")
    put_bytes(store, NEIGHBOUR.key("disk.qcow2"), b"3", ME)
    discard(store, TEMPLATE)
    assert (keys(store), store.uncommitted()) == ([NEIGHBOUR.key("disk.qcow2")], set())


def test_discard_keeps_the_java_agents_template(store: MemoryStore) -> None:
    """A discard keeps a template of CloudStack's Java agent in the same directory, with its properties."""
    foreign = [TEMPLATE.key("9e8d.qcow2"), TEMPLATE.key("template.properties"), f"{TEMPLATE.prefix}/name/image.iso"]
    for key in [*foreign, TEMPLATE.key("201.qcow2")]:
        put_bytes(store, key, b"1", ME)
    discard(store, TEMPLATE)
    assert keys(store) == sorted(foreign)


def test_discard_keeps_a_complete_artifact(store: MemoryStore) -> None:
    """A discard keeps an artifact with a manifest, and deletes only its parts."""
    put_bytes(store, TEMPLATE.key("disk.qcow2"), b"1", ME)
    write_manifest(store, sample(), ME)
    fill(store.writer(TEMPLATE.key("disk.qcow2"), owner=OTHER), b"2")
    discard(store, TEMPLATE)
    assert keys(store) == [TEMPLATE.key("disk.qcow2"), TEMPLATE.key(MANIFEST)]
    assert store.uncommitted() == set()


def changed(**fields: object) -> bytes:
    """Return the sample with other fields."""
    return json.dumps(json.loads(sample().to_json()) | fields).encode()


def with_object(**fields: object) -> bytes:
    """Return the sample with another object."""
    (one,) = json.loads(sample().to_json())["objects"]
    return changed(objects=[one | fields])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="nested deep"),
        pytest.param(b'{"a":' * 100_000, id="objects nested deep"),
        pytest.param(with_object(size="12"), id="size is text"),
        pytest.param(with_object(size=1.5), id="size is no whole number"),
        pytest.param(with_object(size=True), id="size is true"),
        pytest.param(with_object(size=-1), id="negative size"),
        pytest.param(with_object(size=None), id="size is null"),
        pytest.param(with_object(size=1 << 63), id="huge size"),
        pytest.param(with_object(facts={"virtual_size": 1 << 64}), id="huge disk"),
        pytest.param(with_object(facts={"virtual_size": -1}), id="negative disk"),
        pytest.param(changed(facts={"virtual_size": 1 << 64}), id="huge artifact"),
        pytest.param(with_object(digest=5), id="digest is a number"),
        pytest.param(with_object(facts=[]), id="facts are a list"),
        pytest.param(with_object(name="../../x"), id="name that climbs"),
        pytest.param(with_object(name=5), id="name is a number"),
        pytest.param(changed(objects=[5]), id="object is a number"),
        pytest.param(changed(objects={"a": 1}), id="objects are an object"),
        pytest.param(changed(objects=json.loads(sample().to_json())["objects"] * 2), id="two of one name"),
        pytest.param(changed(id=7), id="id is a number"),
        pytest.param(changed(account=["2"]), id="account is a list"),
        pytest.param(changed(account="../2"), id="account that climbs"),
        pytest.param(changed(kind="floppy"), id="unknown kind"),
        pytest.param(changed(created="yesterday"), id="no time"),
        pytest.param(changed(source="x"), id="source is text"),
        pytest.param(changed(version="1"), id="version is text"),
        pytest.param(changed(version=10).replace(b"10", b"9" * 5000), id="version without end"),
    ],
)
def test_odd_manifest(store: MemoryStore, data: bytes) -> None:
    """A manifest of any other shape is CorruptImage for its artifact, and such a draft is ignored."""
    put_bytes(store, TEMPLATE.key(MANIFEST), data, ME)
    put_bytes(store, TEMPLATE.key(DRAFT), data, ME)
    with pytest.raises(CorruptImage):
        read_manifest(store, TEMPLATE)
    assert read_draft(store, TEMPLATE) is None


def test_huge_manifest(store: MemoryStore) -> None:
    """A manifest above the size limit is CorruptImage."""
    put_bytes(store, TEMPLATE.key(MANIFEST), b" " * (17 << 20), ME)
    with pytest.raises(CorruptImage, match="no manifest"):
        read_manifest(store, TEMPLATE)


@pytest.mark.parametrize("fields", [{"id": "2010"}, {"account": "3"}, {"kind": "volume"}])
def test_manifest_of_another(store: MemoryStore, fields: dict[str, str]) -> None:
    """A manifest must name the artifact in whose directory it is."""
    put_bytes(store, TEMPLATE.key(MANIFEST), changed(**fields), ME)
    put_bytes(store, TEMPLATE.key(DRAFT), changed(**fields), ME)
    with pytest.raises(CorruptImage, match="belongs to another artifact"):
        find_manifest(store, TEMPLATE)
    assert read_draft(store, TEMPLATE) is None


def test_an_iso_has_the_place_of_a_template(store: MemoryStore) -> None:
    """ISOs and templates share a directory, so a manifest of either kind is valid there."""
    put_bytes(store, TEMPLATE.key(MANIFEST), changed(kind="iso"), ME)
    assert read_manifest(store, TEMPLATE).artifact.kind == "iso"


def test_newer_manifest(store: MemoryStore) -> None:
    """The error of a newer major version asks for a newer worker, never for the artifact's deletion."""
    put_bytes(store, TEMPLATE.key(MANIFEST), changed(version=99, objects={}), ME)
    with pytest.raises(CorruptImage, match=r"newer ssvm-worker .*version 99.*Upgrade this worker") as caught:
        read_manifest(store, TEMPLATE)
    assert "delete" not in str(caught.value)


def test_new_fields_are_kept() -> None:
    """Unknown fields of a newer version are ignored and written back unchanged."""
    data = json.loads(with_object(compressed=True))
    data |= {"signed": {"by": "ann"}}
    manifest = Manifest.from_json(json.dumps(data).encode(), "here", TEMPLATE)
    assert json.loads(manifest.to_json()) == data


def test_surrogates_are_kept() -> None:
    """Text without a UTF-8 form is written as a JSON escape."""
    manifest = Manifest.from_json(changed(source={"url": "http://h/\ud800"}), "here")
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_missing_facts() -> None:
    """A missing required fact is CorruptImage, not a KeyError."""
    data = sample().to_json().replace(b'"format"', b'"formation"')
    found = Manifest.from_json(data, "here")
    assert found.entries[0].facts["virtual_size"] == 1 << 40
    for lookup in (lambda: found.entries[0].facts["format"], lambda: found.source["digests"]):
        with pytest.raises(CorruptImage, match="lacks the fact"):
            lookup()


@pytest.mark.parametrize(
    ("given", "odd"),
    [(b'"virtual_size": 1099511627776', b'"virtual_size": "12"'), (b'"format": "qcow2"', b'"format": [1]')],
)
def test_odd_facts(given: bytes, odd: bytes) -> None:
    """A fact that readers compute with must have the right type."""
    assert given in sample().to_json()
    with pytest.raises(CorruptImage, match="wrong type"):
        Manifest.from_json(sample().to_json().replace(given, odd), "here")


def test_no_objects(store: MemoryStore) -> None:
    """A manifest without objects is CorruptImage."""
    write_manifest(store, dataclasses.replace(sample(), entries=()), ME)
    with pytest.raises(CorruptImage, match="lists no object"):
        read_manifest(store, TEMPLATE)
