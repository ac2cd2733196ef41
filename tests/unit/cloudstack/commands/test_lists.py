"""A list has all artifacts of a store, or it fails: the server downloads again what is missing."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.cloudstack.commands import lists
from ssvm_worker.cloudstack.image_stores import ImageStores
from ssvm_worker.cloudstack.services import open_services
from ssvm_worker.errors import ObjectNotFound, StoreAway, StoreDenied, StoreUnavailable, WorkerError
from ssvm_worker.jobs.cloudstack_properties import parse_properties
from ssvm_worker.stores.file.tree import translated
from ssvm_worker.streaming.interfaces import Owner, Source, Store, StoredObject
from ssvm_worker.streaming.pipeline import put_bytes
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3

from .agents import NFS, PLACE, Agent, java_template, java_volume, s3_object, settings_of

QCOW2 = {"format": "qcow2", "virtual_size": 1 << 30}


def own_artifact(store: Store, artifact: Artifact, unique_name: str = "", fmt: str = "qcow2") -> None:
    """Write an artifact as a worker does. Without a name it is not for a management server."""
    name = f"{artifact.id}.{'ovf' if fmt == 'ova' else fmt}"
    put_bytes(store, artifact.key(name), b"abc", Owner())
    facts = {"unique_name": unique_name} if unique_name else {}
    source = {"digests": ["sha512:00"], "url": "", "size": 71680}
    entry = Entry(name, 3, "sha256:00", facts=QCOW2 | {"format": fmt})
    write_manifest(store, Manifest(artifact, "job", (entry,), source, facts), Owner())


def names(answer: dict[str, Any]) -> set[str]:
    return set(answer["templateInfos"])


def test_java_template(broker: Broker, tmp_path: Path) -> None:
    """A template of the Java agent has the entry that the Java agent answers for it."""
    agent = Agent(settings_of(broker, tmp_path))
    java_template(tmp_path / "store", 1, 224, "224-1-289c42c5", 71680)
    answer = agent.send("ListTemplateCommand", store=NFS)
    assert answer == {
        "class": "ListTemplateAnswer",
        "secUrl": PLACE,
        "templateInfos": {
            "224-1-289c42c5": {
                "templateName": "224-1-289c42c5",
                "installPath": "template/tmpl/1/224/9e8d.qcow2",
                "size": 1073741824,
                "physicalSize": 71680,
                "id": 224,
                "isPublic": True,
                "isCorrupted": False,
            }
        },
        "result": True,
        "details": "success",
        "contextMap": {},
        "wait": 0,
        "bypassHostMaintenance": False,
    }


def test_java_volume(broker: Broker, tmp_path: Path) -> None:
    """A volume is listed below its id, as the Java agent does."""
    agent = Agent(settings_of(broker, tmp_path))
    java_volume(tmp_path / "store", 1, 5, "rv2")
    infos = agent.send("ListVolumeCommand", store=NFS, secUrl=PLACE)["templateInfos"]
    assert {key: (each["templateName"], each["id"]) for key, each in infos.items()} == {"5": ("rv2", 5)}


def test_own_artifacts(broker: Broker, tmp_path: Path) -> None:
    """An artifact of a worker is listed by the server's name; an OVA has the path and the size of its package."""
    agent = Agent(settings_of(broker, tmp_path))
    store = agent.services.stores.find(_nfs()).open()
    own_artifact(store, Artifact("template", "2", "202"), "202-2-aaaa")
    own_artifact(store, Artifact("template", "2", "203"), "203-2-bbbb", "ova")
    infos = agent.send("ListTemplateCommand", store=NFS)["templateInfos"]
    assert infos["202-2-aaaa"]["installPath"] == "template/tmpl/2/202/202.qcow2"
    assert (infos["203-2-bbbb"]["installPath"], infos["203-2-bbbb"]["physicalSize"]) == (
        "template/tmpl/2/203/203.ova",
        71680,
    )


def test_artifacts_of_others(broker: Broker, tmp_path: Path) -> None:
    """An artifact that no server knows is not listed: the server would delete it."""
    agent = Agent(settings_of(broker, tmp_path))
    own_artifact(agent.services.stores.find(_nfs()).open(), Artifact("template", "2", "202"))
    assert agent.send("ListTemplateCommand", store=NFS)["templateInfos"] == {}


def test_unpublished_artifact_of_others(broker: Broker, tmp_path: Path) -> None:
    """The properties of an ordinary job, whose manifest follows or is gone, are not listed."""
    agent = Agent(settings_of(broker, tmp_path))
    java_template(tmp_path / "store", 2, 202, "2-202")
    assert agent.send("ListTemplateCommand", store=NFS)["templateInfos"] == {}


def test_unfinished_java_download(broker: Broker, tmp_path: Path) -> None:
    """A download of the Java agent that has not ended is not listed."""
    agent = Agent(settings_of(broker, tmp_path))
    java_template(tmp_path / "store", 1, 224, "224-1-289c42c5")
    (tmp_path / "store/template/tmpl/1/224/template.properties").write_text("uniquename=224-1-289c42c5\n")
    assert agent.send("ListTemplateCommand", store=NFS)["templateInfos"] == {}


def test_broken_manifest(broker: Broker, tmp_path: Path) -> None:
    """A manifest that cannot be read fails the list."""
    agent = Agent(settings_of(broker, tmp_path))
    java_template(tmp_path / "store", 1, 224, "224-1-289c42c5")
    folder = tmp_path / "store/template/tmpl/1/225"
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    answer = agent.send("ListTemplateCommand", store=NFS)
    assert (answer["class"], answer["result"]) == ("Answer", False)


def test_unmounted_directory(broker: Broker, tmp_path: Path) -> None:
    """An empty directory instead of the store fails the list, also for an agent that starts now."""
    settings = settings_of(broker, tmp_path)
    java_template(tmp_path / "store", 1, 224, "224-1-289c42c5")
    assert Agent(settings).send("ListTemplateCommand", store=NFS)["result"] is True
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for unmounted in (lambda: None, (tmp_path / "store").mkdir):
        unmounted()
        answer = Agent(settings).send("ListTemplateCommand", store=NFS)
        assert answer["result"] is False
        assert "templateInfos" not in answer


def test_escapes() -> None:
    """Properties are read as Java reads them."""
    text = b"# c=1\n!d=2\na\\ b = x\\=y\\u00e9\\n\nempty=\nk:v\nplain\n"
    assert parse_properties(text) == {"a b": "x=y\u00e9\n", "empty": "", "k": "v", "plain": ""}


@pytest.mark.parametrize(
    ("path", "names_of_page", "dirs"),
    [
        ("", ["template"], [True]),
        ("template/tmpl/1/", ["224", "225"], [True, True]),
        ("/template/tmpl/1/224", ["9e8d.qcow2", "template.properties"], [False, False]),
    ],
)
def test_browse(broker: Broker, tmp_path: Path, path: str, names_of_page: list[str], dirs: list[bool]) -> None:
    """A directory has its entries with sizes; its paths begin with a slash as those of the Java agent do."""
    agent = Agent(settings_of(broker, tmp_path))
    java_template(tmp_path / "store", 1, 224, "a")
    java_template(tmp_path / "store", 1, 225, "b")
    answer = agent.send("ListDataStoreObjectsCommand", store=NFS, path=path, startIndex=0, pageSize=20)
    assert (answer["names"], answer["isDirs"], answer["count"]) == (names_of_page, dirs, len(dirs))
    assert all(each.startswith("/") for each in answer["paths"])


def test_browse_pages(broker: Broker, tmp_path: Path) -> None:
    """A page has at most the asked number of entries, and the count is that of all."""
    agent = Agent(settings_of(broker, tmp_path))
    for number in range(5):
        java_template(tmp_path / "store", 1, 220 + number, str(number))
    answer = agent.send("ListDataStoreObjectsCommand", store=NFS, path="template/tmpl/1", startIndex=2, pageSize=2)
    assert (answer["names"], answer["count"]) == (["222", "223"], 5)


@pytest.mark.parametrize("path", ["../etc", "template/../..", "a//b", "a\x00b", "/etc/passwd/.."])
def test_browse_hostile_paths(broker: Broker, tmp_path: Path, path: str) -> None:
    """A path that leaves the store is refused."""
    agent = Agent(settings_of(broker, tmp_path))
    assert agent.send("ListDataStoreObjectsCommand", store=NFS, path=path)["result"] is False


# Faults


class FaultyReads:
    """A store whose n-th access fails: each listed entry, each opened object and each read chunk is one access."""

    def __init__(self, inner: Store, fail_at: int, error: Callable[[], WorkerError]) -> None:
        self._inner, self._left, self._error = inner, fail_at, error
        self.name, self.url, self.resumable = inner.name, inner.url, inner.resumable

    def _access(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._error()

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        for each in self._inner.list(prefix):
            self._access()
            yield each
        self._access()

    def foreign(self, prefix: str = "") -> Iterator[StoredObject]:
        self._access()
        yield from self._inner.foreign(prefix)  # type: ignore[attr-defined]

    def reader(self, key: str) -> Source:
        return _FaultySource(self._inner.reader(key), self._access)  # type: ignore[return-value]


class _FaultySource:
    resumable = True

    def __init__(self, inner: Source, access: Callable[[], None]) -> None:
        self._inner, self._access, self.name, self.size = inner, access, inner.name, None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        self._access()
        for chunk in self._inner.open(offset):
            yield chunk
            self._access()


class FaultyStores(ImageStores):
    """Opens every store with a fault."""

    fault: Callable[[Store], Any] = staticmethod(lambda store: store)

    def _open(self, name: str, values: dict[str, Any] | None) -> Store:
        return self.fault(super()._open(name, values))  # type: ignore[no-any-return]


ERRORS: list[Callable[[], WorkerError]] = [
    lambda: StoreAway("away"),
    lambda: StoreUnavailable("500"),
    lambda: StoreDenied("denied"),
    *(lambda number=number: translated(OSError(number, os.strerror(number)), "x") for number in (5, errno.ESTALE)),  # type: ignore[misc]
]


@pytest.fixture(scope="module")
def zone(session_broker: Any, tmp_path_factory: pytest.TempPathFactory) -> Agent:
    """An agent whose store has templates and volumes of both kinds."""
    directory = tmp_path_factory.mktemp("zone")
    settings = settings_of(session_broker.with_prefix("lists:"), directory)
    stores = FaultyStores(settings)
    services = open_services(settings)
    agent = Agent(settings, replace(services, stores=stores))
    store = stores.find(_nfs()).open()
    for number in range(3):
        java_template(directory / "store", 1, 200 + number, f"java-{number}")
        java_volume(directory / "store", 1, 200 + number, f"java-{number}")
        own_artifact(store, Artifact("template", "2", str(300 + number)), f"own-{number}")
        own_artifact(store, Artifact("volume", "2", str(300 + number)), f"own-{number}")
    return agent


ALL = {
    "ListTemplateCommand": {f"{kind}-{number}" for kind in ("java", "own") for number in range(3)},
    "ListVolumeCommand": {str(number) for number in (200, 201, 202, 300, 301, 302)},
}


@pytest.mark.parametrize("command", ALL)
@given(fail_at=st.integers(0, 60), error=st.sampled_from(ERRORS))
def test_no_part_of_a_list(zone: Agent, command: str, fail_at: int, error: Callable[[], WorkerError]) -> None:
    """At any fault of the store, the answer has all artifacts or none, and then it is a failure."""
    zone.services.stores.fault = lambda store: FaultyReads(store, fail_at, error)  # type: ignore[attr-defined]
    answer = zone.send(command, store=NFS)
    if answer["result"]:
        assert names(answer) == ALL[command]
    else:
        assert "templateInfos" not in answer
        assert answer["details"]


def test_slow_store(zone: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is too slow fails the list."""
    monkeypatch.setattr(lists, "LIST_S", 0.05)
    end = threading.Event()
    zone.services.stores.fault = lambda store: FaultyReads(store, 3, lambda: end.wait() and StoreAway("x"))  # type: ignore[attr-defined]
    answer = zone.send("ListTemplateCommand", store=NFS)
    end.set()
    assert answer["result"] is False
    assert "did not answer" in answer["details"]


@pytest.mark.parametrize("command", ALL)
def test_all_of_a_list(zone: Agent, command: str) -> None:
    """Without a fault the answer has all artifacts."""
    zone.services.stores.fault = lambda store: store  # type: ignore[attr-defined]
    assert names(zone.send(command, store=NFS)) == ALL[command]


# S3


def test_s3(broker: Broker, tmp_path: Path, s3_server: S3Server) -> None:
    """A bucket has the templates of the Java agent, whose names may have any characters, and those of workers."""
    bucket = s3_server.make_bucket()
    agent = Agent(settings_of(broker, tmp_path))
    store = s3_object(s3_server, bucket)
    opened = agent.services.stores.find(_typed(store)).open()
    put_bytes(opened, "template/tmpl/2/202/202-2-aaaa/a.qcow2", b"abc", Owner())
    s3_server.client().put_object(Bucket=bucket, Key="template/tmpl/2/203/203-2-bbbb/My image (1).iso", Body=b"abcd")
    put_bytes(opened, "volumes/2/31/v.qcow2", b"abc", Owner())
    own_artifact(opened, Artifact("template", "2", "204"), "204-2-cccc")
    answer = agent.send("ListTemplateCommand", store=store)
    assert answer["secUrl"] == bucket
    paths = {name: each["installPath"] for name, each in answer["templateInfos"].items()}
    assert paths == {
        "202-2-aaaa": "template/tmpl/2/202/202-2-aaaa/a.qcow2",
        "203-2-bbbb": "template/tmpl/2/203/203-2-bbbb/My image (1).iso",
        "204-2-cccc": "template/tmpl/2/204/204.qcow2",
    }
    assert agent.send("ListVolumeCommand", store=store)["templateInfos"].keys() == {"31"}


@pytest.mark.parametrize(
    "fault", [Fault("GetObject", 500), Fault("GetObject", 503, "SlowDown"), Fault("GetObject", 403)]
)
def test_s3_faults(broker: Broker, tmp_path: Path, s3_server: S3Server, fault: Fault) -> None:
    """A page or an object that S3 does not return fails the list."""
    bucket = s3_server.make_bucket()
    with FaultyS3(s3_server) as proxy:
        agent = Agent(settings_of(broker, tmp_path))
        store = s3_object(s3_server, bucket)
        store["com.cloud.agent.api.to.S3TO"]["endPoint"] = proxy.endpoint.removeprefix("http://")
        own_artifact(agent.services.stores.find(_typed(store)).open(), Artifact("template", "2", "204"), "204-2-cccc")
        proxy.faults.append(fault)
        answer = agent.send("ListTemplateCommand", store=store)
    assert answer["result"] is False
    assert "templateInfos" not in answer


@pytest.mark.parametrize("command", ["ListTemplateCommand", "ListVolumeCommand", "ListDataStoreObjectsCommand"])
@pytest.mark.parametrize(("status", "cut_at"), [(500, None), (403, None), (200, 300)])
def test_s3_second_page(
    broker: Broker, tmp_path: Path, s3_server: S3Server, command: str, status: int, cut_at: int | None
) -> None:
    """A second page that S3 does not return, or returns in part, fails the list."""
    bucket = s3_server.make_bucket()
    with FaultyS3(s3_server) as proxy:
        agent = Agent(settings_of(broker, tmp_path))
        store = s3_object(s3_server, bucket)
        store["com.cloud.agent.api.to.S3TO"]["endPoint"] = proxy.endpoint.removeprefix("http://")
        opened: Any = agent.services.stores.find(_typed(store)).open()
        for number in range(4):
            put_bytes(opened, f"template/tmpl/2/20{number}/20{number}-2-a/a.qcow2", b"abc", Owner())
            put_bytes(opened, f"volumes/2/20{number}/a.qcow2", b"abc", Owner())
        events = opened._bucket.client.meta.events
        events.register("before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=3))
        path = {"path": "volumes/2"} if command == "ListDataStoreObjectsCommand" else {}
        complete = agent.send(command, store=store, **path)
        assert len(complete.get("templateInfos") or complete["names"]) == 4
        assert "ListObjectsV2 next" in proxy.names()
        proxy.faults.append(Fault("ListObjectsV2 next", status, cut_at=cut_at))
        answer = agent.send(command, store=store, **path)
    assert answer["result"] is False
    assert not {"templateInfos", "names"} & answer.keys()


# Moves


class MovingReads:
    """A store in which each walk misses a volume: it moves to where the walk has been."""

    def __init__(self, inner: Store, root: Path, moves: list[int], note: Callable[[], None]) -> None:
        self._inner, self._root, self._moves, self._note = inner, root, moves, note
        self.name, self.url, self.resumable = inner.name, inner.url, inner.resumable

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        for each in list(self._inner.list(prefix)):
            moved = self._root / "volumes" / each.key.split("/")[1] / "200"
            if moved.exists() and self._moves:
                self._note()
                to = self._root / f"volumes/{self._moves.pop()}/200"
                to.parent.mkdir()
                moved.rename(to)
            with suppress(ObjectNotFound):
                yield self._inner.stat(each.key)

    def foreign(self, _: str = "") -> Iterator[StoredObject]:
        return iter(())

    def reader(self, key: str) -> Source:
        return self._inner.reader(key)


@pytest.mark.parametrize(("moves", "result"), [(0, True), (1, True), (2, True), (30, False)])
def test_moved_volume(broker: Broker, tmp_path: Path, moves: int, result: bool) -> None:
    """A volume that is moved during a list, once or often, is in the list, or the list fails."""
    settings = settings_of(broker, tmp_path)
    stores, services = FaultyStores(settings), open_services(settings)
    places = list(range(60 - moves, 60))
    stores.fault = lambda store: MovingReads(  # type: ignore[method-assign]
        store, tmp_path / "store", places, lambda: services.names.note_move("primary")
    )
    agent = Agent(settings, replace(services, stores=stores))
    java_volume(tmp_path / "store", 60, 200, "a")
    java_volume(tmp_path / "store", 70, 201, "b")
    answer = agent.send("ListVolumeCommand", store=NFS)
    assert answer["result"] is result
    assert answer.get("templateInfos", {}).keys() == ({"200", "201"} if result else set())
    assert result or "moved" in answer["details"]


def _nfs() -> Any:
    return _typed(NFS)


def _typed(store: dict[str, Any]) -> Any:
    from ssvm_worker.cloudstack.transfer_objects import TRANSFER_OBJECTS

    ((name, fields),) = json.loads(json.dumps(store)).items()
    return TRANSFER_OBJECTS[name].model_validate(fields)
