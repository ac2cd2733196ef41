"""Quota: stored bytes are counted per account, and excess is refused before or during the transfer."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.cli import main
from ssvm_worker.errors import ConfigError, CorruptImage, QuotaExceeded, StoreUnavailable
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.delete import job as delete
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.ledger.quota import AccountUsage, LocalQuota, Quota
from ssvm_worker.ledger.quota.redis import SharedQuota
from ssvm_worker.stores.memory import MemoryStore
from tests import images
from tests.attempts import attempt
from tests.contracts.quota import QuotaContract
from tests.neighbours import free_port
from tests.servers.broker import Broker
from tests.servers.http import HttpServer
from tests.servers.worker import until
from tests.unit.jobs.backup.test_grain_jobs import NAMES, RAWS, back_up
from tests.waiting import CLAIM_S, PATIENCE_S

MiB = 1 << 20
IMAGE = images.mbr(2 * MiB)
#: The image, and the properties file beside it.
MOST = len(IMAGE) + 2000


class TestLocal(QuotaContract):
    """A quota in this process."""

    @pytest.fixture
    def quota(self) -> Quota:
        """Return a new quota."""
        return LocalQuota()


class TestShared(QuotaContract):
    """A quota in a broker."""

    @pytest.fixture
    def quota(self, broker: Broker) -> Quota:
        """Return a new quota."""
        return SharedQuota(broker.url, prefix=broker.prefix, claim_s=60)


def hold_for_ever(url: str, prefix: str, held: Any) -> None:
    """Reserve room until the process is killed."""
    with SharedQuota(url, prefix=prefix, claim_s=CLAIM_S).hold("acme", "j1", 100) as grow:
        grow(80)
        held.set()
        time.sleep(PATIENCE_S)


def test_dead_worker(broker: Broker) -> None:
    """A killed worker's reservation is released after the time of a claim, and not earlier."""
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    worker = spawn.Process(target=hold_for_ever, args=(broker.url, broker.prefix, held))
    worker.start()
    assert held.wait(PATIENCE_S)
    quota = SharedQuota(broker.url, prefix=broker.prefix, claim_s=CLAIM_S)
    renewed = time.monotonic() + 2 * CLAIM_S
    until(lambda: time.monotonic() > renewed, "two claims' time has passed")
    assert list(quota.usage()) == [AccountUsage("acme", 0, 80)]
    worker.kill()
    until(lambda: not any(each.reserved for each in quota.usage()), "it is free")


def test_clock_was_set_back(broker: Broker) -> None:
    """A dead worker's reservation is released even if the broker's clock was set back."""
    quota = SharedQuota(broker.url, prefix=broker.prefix)
    with broker.client() as client:
        client.hset(f"{broker.prefix}ssvm.quota:held:acme", "j1", 80)
        client.zadd(f"{broker.prefix}ssvm.quota:until:acme", {"j1": time.time() + 3 * 3600})
    assert [each.reserved for each in quota.usage()] == [0]


class World:
    """A store, a server, and a quota."""

    def __init__(self, server: HttpServer) -> None:
        self.store = MemoryStore("primary")
        self.other = MemoryStore("archive")
        self.quota = LocalQuota()
        self.server = server

    def attempt(self, limit: int | None = None, **given: Any) -> Any:
        return attempt(
            self.store, self.other, quota=self.quota, settings={"quota": {"accounts": {"acme": limit}}}, **given
        )

    def fetch(self, limit: int | None = None, id_: str = "1", url: str = "", **fields: Any) -> Any:
        url = url or self.server.serve(f"image{id_}", IMAGE)
        request = parse_request(download.Request, {"url": url, "account": "acme", "id": id_} | fields, "download")
        it = self.attempt(limit)
        try:
            return download.run(request, it)
        except BaseException:
            download.discard(request, it)
            raise

    @property
    def used(self) -> int:
        return sum(each.used for each in self.quota.usage())

    @property
    def stored(self) -> int:
        """Return the stored bytes without the manifests."""
        there = (each for store in (self.store, self.other) for each in store.list())
        return sum(each.size for each in there if not each.key.endswith("manifest.json"))


@pytest.fixture
def world(http_server: HttpServer) -> World:
    """Return a world with nothing stored."""
    return World(http_server)


def test_commit_and_delete(world: World) -> None:
    """Stored bytes count on each store, and deleted bytes no longer count."""
    world.fetch(stores=["primary", "archive"])
    assert world.used == world.stored > 2 * len(IMAGE)
    world.fetch(stores=["primary", "archive"])
    assert world.used == world.stored
    fields = {"account": "acme", "id": "1", "stores": ["archive"]}
    delete.run(parse_request(delete.Request, fields, "delete"), world.attempt())
    assert world.used == world.stored > len(IMAGE)


def test_copies_count(world: World) -> None:
    """A copy counts, but is never refused, because the administrator requests it."""
    world.fetch(MOST)
    fields = {"account": "acme", "id": "1", "stores": ["archive"]}
    copy.run(parse_request(copy.Request, fields, "copy"), world.attempt(MOST))
    assert world.used == world.stored > 2 * len(IMAGE)


def test_refused_before_the_transfer(world: World) -> None:
    """A file of known size is refused before it is stored, with account, limit and size."""
    world.fetch(MOST)
    before = world.stored
    said = rf"account acme is .*\({MOST} bytes\): it has used .*\({world.used} bytes\), and this needs .*\({len(IMAGE)}"
    with pytest.raises(QuotaExceeded, match=said):
        world.fetch(MOST, "2")
    assert world.stored == before
    assert list(world.store.leftovers()) == []


@pytest.mark.parametrize("over", [0, 1])
def test_chunked(world: World, over: int) -> None:
    """A file of unknown size is refused as soon as it exceeds the quota, and nothing stays."""
    data = random.Random(5).randbytes(3 * MiB)
    url = world.server.serve("chunked", data, chunked=True)
    if not over:
        world.fetch(len(data) + 1000, url=url, format="raw")
        return
    with pytest.raises(QuotaExceeded):
        world.fetch(len(data) - 1, url=url, format="raw")
    assert world.stored == 0
    assert list(world.store.leftovers()) == []
    assert list(world.quota.usage()) == []


def test_several_stores(world: World) -> None:
    """Each store of a download needs room, and no store is owed bytes above the quota."""
    with pytest.raises(QuotaExceeded):
        world.fetch(MOST, stores=["primary", "archive"])
    assert world.stored == 0


@pytest.mark.parametrize(("asked", "fits"), [("1MiB", False), ("10MiB", True)])
def test_request_decides(world: World, asked: str, fits: bool) -> None:
    """The limit of a request replaces the limit of the settings, higher or lower."""
    if fits:
        assert world.fetch(1, quota=asked)
        return
    with pytest.raises(QuotaExceeded):
        world.fetch(10 * MiB, quota=asked)


def test_no_room_at_all(world: World) -> None:
    """An account over its limit can store nothing more."""
    world.fetch()
    with pytest.raises(QuotaExceeded, match="needs 0 B"):
        world.fetch(1, "2")


def test_verify_counts_anew(world: World) -> None:
    """A scrub of all artifacts corrects wrong counts: existing and missing artifacts."""
    world.fetch()
    right = world.used
    world.quota.note("acme", "primary", "template/tmpl/acme/1", 5)
    world.quota.note("acme", "primary", "template/tmpl/acme/gone", 5)
    verify.run(parse_request(verify.Request, {"all": True}, "verify"), world.attempt())
    assert world.used == right


def test_incremental_backups(world: World) -> None:
    """The shared packs of a volume count once, as long as any backup needs them."""
    quota = LocalQuota()
    for id_, raw in RAWS.items():
        back_up(world.store, id_, raw)
    request = parse_request(verify.Request, {"all": True}, "verify")
    with pytest.raises(CorruptImage, match="no descriptor"):  # these have only their own grains
        verify.run(request, attempt(world.store, quota=quota))
    assert sum(each.used for each in quota.usage()) == world.stored
    for id_ in RAWS:
        it = delete.Request(id=id_, **NAMES)  # type: ignore[arg-type]
        delete.run(it, attempt(world.store, quota=quota))
        assert sum(each.used for each in quota.usage()) == world.stored
    assert world.stored == 0


def test_broker_away(world: World) -> None:
    """Without the broker, jobs with a limit wait, and others are stored and counted later."""

    class Away(LocalQuota):
        def hold(self, *_: Any) -> Any:
            raise StoreUnavailable("The broker cannot be reached")

        def note(self, *_: Any) -> None:
            raise StoreUnavailable("The broker cannot be reached")

    world.quota = Away()
    with pytest.raises(StoreUnavailable):
        world.fetch(MOST)
    assert world.fetch()


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, {"acme": None, "2": None}),
        ({"default": "1GiB"}, {"acme": 1 << 30, "2": 1 << 30}),
        ({"default": 5, "accounts": {"2": "unlimited"}}, {"acme": 5, "2": None}),
        ({"accounts": {"acme": "2TB"}}, {"acme": 2 * 10**12, "2": None}),
        ({"accounts": {"acme": 0}}, {"acme": 0, "2": None}),
    ],
)
def test_settings(given: dict[str, Any], limits: dict[str, int | None]) -> None:
    """An account's limit precedes the default, and may be bytes or a size with a unit."""
    quota = config.parse({"quota": given}, "test").quota
    assert {each: quota.of(each) for each in limits} == limits


@pytest.mark.parametrize("wrong", ["much", "-5", -5])
def test_wrong_settings(wrong: Any) -> None:
    """An invalid size is refused with the setting's name."""
    with pytest.raises(ConfigError, match=r"quota\.default"):
        config.parse({"quota": {"default": wrong}}, "test")


@pytest.fixture
def ssvm(
    tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    """Return the command line with a store in a directory, and a broker."""
    (tmp_path / "s").mkdir()
    for name, value in (
        ("STORES__PRIMARY__URL", f"file://{tmp_path}/s"),
        ("BROKER__URL", broker.url),
        ("BROKER__PREFIX", broker.prefix),
        ("DOWNLOAD__ALLOW_NETWORKS", "127.0.0.0/8"),
        ("QUOTA__DEFAULT", "3MiB"),
    ):
        monkeypatch.setenv(f"SSVM_{name}", value)

    def run(*argv: str) -> tuple[int, Any]:
        status = main([*argv, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_command(ssvm: Callable[..., tuple[int, Any]], http_server: HttpServer) -> None:
    """`ssvm quota` shows a download, the next one is refused with status 1, and a deletion makes room."""
    url = http_server.serve("image", IMAGE)
    assert ssvm("run", "download", "--url", url, "--account", "acme", "--id", "1")[0] == 0
    ((status, (row,)),) = [ssvm("quota")]
    assert (status, row["account"], row["limit"], row["reserved"]) == (0, "acme", 3 * MiB, 0)
    assert row["limit"] - row["used"] == row["free"] < MiB
    status, error = ssvm("run", "download", "--url", url, "--account", "acme", "--id", "2")
    assert (status, error["error"]) == (1, "QuotaExceeded")
    assert ssvm("delete", "template/tmpl/acme/1")[0] == 0
    assert ssvm("quota", "acme")[1][0]["used"] == 0
    assert ssvm("run", "download", "--url", url, "--account", "acme", "--id", "2")[0] == 0


LOOK = """
import sys
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import StoreUnavailable
from ssvm_worker.wiring import assembly
settings = Settings.model_validate({"broker": {"url": sys.argv[1]}})
try:
    list(assembly.open_quota(settings).usage())
except StoreUnavailable as error:
    print(error.what)
print("redis" in sys.modules)
"""


def test_no_broker() -> None:
    """An absent broker is reported without the client's import, which takes as long as a small job."""
    command = [sys.executable, "-c", LOOK, f"redis://127.0.0.1:{free_port()}/0"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith("The broker cannot be reached: ")
    assert said[1] == "False"
