"""The store of a transfer object is configured, opened by every worker by its name, or refused."""

from __future__ import annotations

import hashlib
import stat
import threading
import uuid
from pathlib import Path

import pytest

from ssvm_worker.cloudstack import image_stores
from ssvm_worker.cloudstack.deadlines import StoreCalls
from ssvm_worker.cloudstack.image_stores import ImageStores, canonical, described, is_allowed, mount_directory, place_of
from ssvm_worker.cloudstack.transfer_objects import S3TO, NfsTO, PrimaryDataStoreTO, StoreRole, SwiftTO, Wire
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ConfigError, InvalidRequest, StoreAway
from ssvm_worker.operations.mounts import nfs_mounts, stores_away
from ssvm_worker.stores.nfs.store import NfsStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.wiring.assembly import open_cloudstack_web
from ssvm_worker.wiring.server_names import server_names, with_server_names, with_server_stores
from ssvm_worker.wiring.stores import Stores
from tests.servers.broker import Broker

NFS = NfsTO(url="nfs://192.0.2.10/export/sec1", role=StoreRole.IMAGE)
S3 = S3TO(bucket_name="cs", end_point="s3.example.test:9000", access_key="EXAMPLEACCESS", secret_key="hunter2")


def settings_of(broker: Broker, tmp_path: Path, **cloudstack: object) -> Settings:
    values = {
        "state_dir": str(tmp_path / "state"),
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "stores": {"primary": {"url": f"file://{tmp_path}", "shared": True}},
        "cloudstack": cloudstack,
    }
    return parse(values, "the test")


@pytest.mark.parametrize(
    ("place", "pattern", "allowed"),
    [
        ("nfs://10.0.0.5/export/sec", "nfs://*", True),
        ("nfs://10.0.0.5/export/sec", "nfs://10.0.0.5", True),
        ("nfs://10.0.0.5/export/sec", "nfs://10.0.0.*/*", True),
        ("nfs://10.0.0.5/export/sec", "nfs://10.0.0.*/export/*", True),
        ("nfs://10.0.0.5/export/sec", "nfs://10.0.0.5/other/*", False),
        ("nfs://10.0.0.5.example.org/export/sec", "nfs://10.0.0.*/*", False),
        ("nfs://10.0.0.55/export/sec", "nfs://10.0.0.5", False),
        ("nfs://10.0.0.5/export/sec2", "nfs://10.0.0.5/export/sec", False),
        ("s3://s3.example.test:9000/cs", "nfs://*", False),
        ("s3://s3.example.test:9000/cs", "s3://s3.example.test:9000/*", True),
        ("s3://s3.example.test:9000/cs", "s3://s3.example.test/*", False),
        ("s3://s3.example.test:9000/cs", "s3://*/cs", True),
        ("nfs://[fd00::5]/export/sec", "nfs://[FD00:0::5]/*", True),
        ("nfs://[fd00::5]/export/sec", "nfs://fd00::5/*", True),
        ("nfs://[fd00::5]/export/sec", "nfs://[fd00::*]/*", True),
        ("nfs://[fd00::1:5]/export/sec", "nfs://[fd00::*]/*", False),
        ("s3://[fd00::5]:9000/cs", "s3://[fd00::5]:9000/*", True),
        ("s3://[fd00::5]:9000/cs", "s3://[fd00::5]/*", False),
    ],
)
def test_allowed(place: str, pattern: str, allowed: bool) -> None:
    """A pattern allows a place as a whole; a * in a host name does not cross a dot."""
    assert is_allowed(place, [pattern]) == allowed


def test_mount_directory() -> None:
    """The name of the mount directory is the one that the Java agent has answered."""
    assert mount_directory("nfs://192.0.2.10/export/sec1") == "211a4e01-cf68-3a99-9f57-f56c563748d4"
    full = uuid.UUID(bytes=hashlib.md5(b"fd00:0:0:0:0:0:0:5:/e").digest(), version=3)
    assert mount_directory("nfs://[fd00::5]/e") == str(full)


def test_places() -> None:
    """Two spellings of an NFS URL are one place, and two spellings of an IPv6 address too."""
    assert canonical("NFS://Host.example/a//b/") == canonical("nfs://host.example/a/b")
    assert place_of(S3) == "s3://s3.example.test:9000/cs"
    assert place_of(NfsTO(url="nfs://[FD00:0::5]:2049/a")) == "nfs://[fd00::5]/a"
    assert place_of(S3TO(end_point="http://[FD00:0::5]:9000", bucket_name="b")) == "s3://[fd00::5]:9000/b"
    bare = S3TO(end_point="fd00::5", bucket_name="b")
    assert (place_of(bare), described(bare)["endpoint"]) == ("s3://[fd00::5]/b", "http://[fd00::5]")


@pytest.mark.parametrize("store", [SwiftTO(url="http://swift"), PrimaryDataStoreTO(uuid="x"), None])
def test_unsupported(store: Wire | None) -> None:
    """Swift, a primary storage and a missing store are refused with a reason."""
    with pytest.raises(InvalidRequest):
        place_of(store)


def test_described() -> None:
    """The version of NFS and the credentials of S3 are those of the server; Amazon's region comes from the name."""
    assert described(NFS, "4.1")["url"] == "nfs://192.0.2.10/export/sec1?vers=4.1"
    assert described(NFS, "null")["url"] == "nfs://192.0.2.10/export/sec1"
    assert described(S3)["secret_key"] == "hunter2"
    assert described(S3)["endpoint"] == "http://s3.example.test:9000"
    amazon = described(S3TO(bucket_name="cs", end_point="s3.eu-west-1.amazonaws.com", https_flag=True))
    assert amazon == {"url": "s3://cs", "region": "eu-west-1"}
    assert described(S3TO(bucket_name="cs", end_point="s3.amazonaws.com")) == {"url": "s3://cs"}


def test_named_store(broker: Broker, tmp_path: Path) -> None:
    """A worker opens a store of the server by its name, with its options; the name shows no secret and no address."""
    settings = settings_of(broker, tmp_path)
    stores = ImageStores(settings)
    nfs, s3 = stores.find(NFS, "4.1"), stores.find(S3)
    assert nfs.name.startswith("cs-")
    assert len({nfs.name, s3.name}) == 2
    worker = with_server_stores(settings)
    opened = Stores(worker)[nfs.name]
    assert isinstance(opened, NfsStore)
    assert opened.mounted.export.versions == ("4.1",)
    assert worker.stores[s3.name].endpoint == "http://s3.example.test:9000"
    assert "hunter2" not in repr(worker)
    assert settings.stores.keys() == {"primary"}, "the settings of other jobs do not change"


def test_lost_settings(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a store are written again after a while, because the broker may have lost them."""
    monkeypatch.setattr(image_stores, "_REPEAT_S", 0.0)
    settings = settings_of(broker, tmp_path)
    stores = ImageStores(settings)
    name = stores.find(NFS).name
    broker.client().delete(f"{broker.prefix}ssvm.server.stores")
    assert stores.find(NFS).name == name
    assert server_names(settings).stores().keys() == {name}


def test_watched_mounts(broker: Broker, tmp_path: Path) -> None:
    """The worker probes and unmounts the exports that a server has named, too."""
    settings = settings_of(broker, tmp_path)
    assert nfs_mounts(with_server_stores(settings)) == []
    ImageStores(settings).find(NFS)
    assert [each.export.source for each in nfs_mounts(with_server_stores(settings))] == ["192.0.2.10:/export/sec1"]
    assert stores_away(with_server_stores(settings)) == {}


def test_new_secrets(broker: Broker, tmp_path: Path) -> None:
    """New keys replace those of the same store."""
    settings = settings_of(broker, tmp_path)
    stores = ImageStores(settings)
    first = stores.find(S3)
    second = stores.find(S3.model_copy(update={"secret_key": S3TO(secret_key="new").secret_key}))
    assert first.name == second.name
    assert server_names(settings).stores()[first.name]["secret_key"] == "new"


def test_mapped_store(broker: Broker, tmp_path: Path) -> None:
    """A place in [cloudstack.stores] is the configured store."""
    settings = settings_of(broker, tmp_path, stores={"nfs://192.0.2.10/export/sec1/": "primary"})
    found = ImageStores(settings).find(NFS)
    assert (found.name, found.open().url) == ("primary", f"file://{tmp_path}")
    assert server_names(settings).stores() == {}


def test_mapped_to_nothing(broker: Broker, tmp_path: Path) -> None:
    """A map to a store that does not exist names the setting."""
    settings = settings_of(broker, tmp_path, stores={"nfs://192.0.2.10/export/sec1": "other"})
    with pytest.raises(ConfigError, match=r"cloudstack\.stores"):
        ImageStores(settings).find(NFS)


@pytest.mark.parametrize("url", ["nfs://192.0.2.99/x", "nfs://192.0.2.10/a b", "nfs://192.0.2.10/../x", "nfs:///x"])
def test_refused(broker: Broker, tmp_path: Path, url: str) -> None:
    """A store that the patterns do not allow, or whose URL is invalid, reaches no worker."""
    settings = settings_of(broker, tmp_path, allow_stores=["nfs://192.0.2.10"])
    with pytest.raises((InvalidRequest, ConfigError)):
        ImageStores(settings).find(NfsTO(url=url))
    assert server_names(settings).stores() == {}


@pytest.mark.parametrize("section", ["stores", "credentials"])
def test_reserved_names(section: str) -> None:
    """The settings may not use a name that the agent could make."""
    values = {section: {"cs-1": {"url": "file:///x"} if section == "stores" else {}}}
    with pytest.raises(ConfigError, match="cs-"):
        parse(values, "the test")


def test_no_store_urls(broker: Broker, tmp_path: Path) -> None:
    """No setting lets ``store:`` URLs of ordinary jobs read a store of the server."""
    with pytest.raises(ConfigError, match="cs-"):
        parse({"download": {"allow_stores": ["cs-1"]}}, "the test")
    settings = settings_of(broker, tmp_path)
    name = ImageStores(settings).find(NFS).name
    assert name not in with_server_stores(settings).download.allow_stores


def test_connection(broker: Broker, tmp_path: Path) -> None:
    """The connection of a download changes networks, proxy, redirects and credentials of this job only."""
    settings = settings_of(broker, tmp_path)
    values = {
        "proxy": "http://u:p@proxy:3128",
        "follow_redirects": False,
        "credentials": {"username": "u", "password": "hunter2", "hosts": ["h"], "allow_plaintext": True},
    }
    open_cloudstack_web(settings).set_internal_sites(["10.1.0.0/16", "nonsense"])
    server_names(settings).put_connection("cs-download-1", values, 60)
    found = with_server_names(settings, "download", "cs-download-9", {"credentials": "cs-download-1"})
    assert found.download.allow_networks == ("10.1.0.0/16",)
    assert found.download.max_redirects == 0
    assert found.credentials["cs-download-1"].username == "u"
    assert "hunter2" not in repr(found)
    assert ":p@" not in repr(found)
    assert with_server_names(settings, "download", "cs-download-9", {"credentials": None}).download == settings.download
    with pytest.raises(InvalidRequest):
        with_server_names(settings, "download", "cs-download-9", {"credentials": "cs-download-2"})


def test_modes(broker: Broker, tmp_path: Path) -> None:
    """Hypervisors and Apache can read files and directories of a shared store, with any umask."""
    settings = settings_of(broker, tmp_path)
    put_bytes(Stores(settings)["primary"], "template/tmpl/2/201/x", b"1", Owner())
    modes = [
        stat.S_IMODE((tmp_path / each).stat().st_mode) for each in ("template/tmpl/2/201", "template/tmpl/2/201/x")
    ]
    assert modes == [0o755, 0o644]


def test_hung_calls() -> None:
    """A call that hangs is given up after its limit; more of them fail at once, and other stores work."""
    calls, end = StoreCalls(), threading.Event()
    for _ in range(8):
        with pytest.raises(StoreAway):
            calls.run("hung", end.wait, 0.01)
    with pytest.raises(StoreAway, match="earlier calls"):
        calls.run("hung", lambda: 1, 60)
    assert calls.run("other", lambda: 1, 60) == 1
    end.set()


def test_call_error() -> None:
    """The error of a call is raised in the caller."""
    with pytest.raises(ZeroDivisionError):
        StoreCalls().run("x", lambda: 1 // 0, 60)
