"""Only the agent's jobs can name the stores and connections of a management server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssvm_worker.client import Client
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest, ObjectNotFound
from ssvm_worker.jobs import JOBS, find_job
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.runner.messages import Message, refuse
from ssvm_worker.runner.run import run_job
from ssvm_worker.wiring.assembly import new_job, open_ledger
from ssvm_worker.wiring.own_stores import refuse_stores
from ssvm_worker.wiring.server_names import server_names, with_server_names
from ssvm_worker.wiring.stores import Stores
from tests.servers.broker import Broker

STORE, CONNECTION = "cs-1", "cs-from-cs-1"
KEY = "template/tmpl/2/201"
ONE = {"kind": "template", "account": "2", "id": "201"}
#: A request of each job that names the server's store or connection, for jobs that name a store.
NAMING: list[tuple[str, dict[str, Any]]] = [
    ("download", ONE | {"url": "http://192.0.2.1/x", "stores": [STORE]}),
    ("download", ONE | {"url": f"store:{STORE}/{KEY}/x", "stores": ["primary"], "credentials": CONNECTION}),
    ("download", ONE | {"url": f"store:{STORE}/{KEY}/x", "stores": ["primary"]}),
    ("upload", {"store": STORE, "key": f"{KEY}/x", "destination": "http://192.0.2.1/x"}),
    ("restore", {"store": STORE, "account": "2", "volume": "1", "id": "3", "template": "9"}),
    ("copy", ONE | {"source": STORE, "stores": ["primary"]}),
    ("copy", ONE | {"source": "primary", "stores": [STORE]}),
    ("verify", ONE | {"stores": [STORE]}),
    ("delete", ONE | {"stores": [STORE]}),
    ("transfer", {"source": STORE, "key": KEY, "store": "primary"}),
    ("transfer", {"source": "primary", "key": KEY, "store": STORE}),
    ("fetch", {"urls": ["http://192.0.2.1/x"], "keys": ["snapshots/2/1/x"], "store": STORE}),
    ("split", {"account": "2", "id": "201", "disk": "x.vmdk", "template": "202", "store": STORE, "unique_name": "n"}),
]


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    """Settings of a worker whose broker has the names of a server."""
    for name in ("primary", "server"):
        (tmp_path / name).mkdir()
    values = {
        "zone": "z",
        "state_dir": str(tmp_path / "state"),
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "stores": {"primary": {"url": f"file://{tmp_path / 'primary'}"}},
        "retry": {"max_attempts": 1},
        "download": {"allow_directories": [str(tmp_path)]},
    }
    settings = parse(values, "the test")
    file = tmp_path / "server" / KEY / "x"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"secret")
    server_names(settings).put_store(STORE, {"url": f"file://{tmp_path / 'server'}"})
    connection = {"credentials": {}, "proxy": None, "follow_redirects": True, "allow_stores": [STORE]}
    server_names(settings).put_connection(CONNECTION, connection, 60)
    return settings


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    with open_ledger(settings) as ledger:
        yield ledger


@pytest.mark.parametrize(("job", "request_"), NAMING)
def test_message(settings: Settings, ledger: Ledger, tmp_path: Path, job: str, request_: dict[str, Any]) -> None:
    """A job from a message cannot read or change a store of the server."""
    with pytest.raises(Exception, match="cs-"):
        run_job(settings, Message(job, [request_], {}, "t1"))
    assert ledger.get("t1").state in ("failed", "queued")
    files = [
        str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*") if each.is_file() and "state" not in str(each)
    ]
    assert files == [f"server/{KEY}/x"]


def test_all_jobs() -> None:
    """The table above has every job whose request names a store, apart from backups, which need a vCenter."""
    of_stores = {name for name, job in JOBS.items() if {"store", "stores", "source"} & job.Request.model_fields.keys()}
    assert of_stores - {"backup"} == {job for job, _ in NAMING}


@pytest.mark.parametrize("name", sorted(set(JOBS) - {"cleanup"}))
def test_hidden(settings: Settings, tmp_path: Path, name: str) -> None:
    """The stores do not exist for a job of another sender, and no URL of it points into them."""
    found = with_server_names(settings, name, "j1", {"credentials": CONNECTION})
    assert [*Stores(found)] == ["primary"]
    assert CONNECTION not in found.credentials
    assert STORE not in found.download.allow_stores
    with pytest.raises(InvalidRequest):
        refuse_stores(found, f"file://{tmp_path}/server/{KEY}/x")


def test_clean_up(settings: Settings) -> None:
    """A clean-up sees all stores, because its request names none."""
    assert STORE in Stores(with_server_names(settings, "cleanup", "j1", {}))
    assert not {"store", "stores", "source", "credentials"} & find_job("cleanup").Request.model_fields.keys()


def _by_message(settings: Settings, job_id: str) -> None:
    run_job(settings, Message("delete", [ONE | {"stores": [STORE], "job_id": job_id}], {}, "t1"))


def _by_task_id(settings: Settings, job_id: str) -> None:
    run_job(settings, Message("delete", [ONE | {"stores": [STORE]}], {}, job_id))


def _by_client(settings: Settings, job_id: str) -> None:
    Client(settings).submit("delete", job_id=job_id, **ONE, stores=[STORE])


def _by_shell(settings: Settings, job_id: str) -> None:
    new_job(settings, find_job("delete"), ONE | {"stores": [STORE], "job_id": job_id})


@pytest.mark.parametrize("send", [_by_message, _by_task_id, _by_client, _by_shell])
def test_ids(settings: Settings, ledger: Ledger, send: Callable[[Settings, str], None]) -> None:
    """No other sender can take an id of the agent, not even for a job that is refused."""
    with pytest.raises(InvalidRequest, match="cs-"):
        send(settings, "cs-delete-1")
    with pytest.raises(ObjectNotFound):
        ledger.get("cs-delete-1")


def test_refused_message(settings: Settings, ledger: Ledger) -> None:
    """A message that Celery cannot read does not become a record with an id of the agent."""
    message = SimpleNamespace(
        headers={"task": "ssvm.delete", "id": "cs-delete-1"},
        content_type="application/json",
        body='[[{"job_id": "cs-delete-2"}], {}, {}]',
        delivery_info={"routing_key": "ssvm.z.maintenance"},
    )
    refuse(ledger, settings, message, InvalidRequest("bad"))
    assert ledger.counts()["failed"] == 0


def test_retry(settings: Settings, ledger: Ledger) -> None:
    """A retry of a refused job does not give it a store of the server either."""
    request = ONE | {"stores": [STORE], "job_id": "cs-delete-1", "unknown": 1}
    with pytest.raises(InvalidRequest):
        run_job(settings, Message("delete", [request], {}, "t1"))
    ledger.retry("t1", "an operator")
    with pytest.raises(InvalidRequest):
        run_job(settings, Message("delete", [{"job_id": "t1"}], {}, "t2"))
    assert (Path(settings.stores["primary"].url[7:]).parent / "server" / KEY / "x").exists()


def test_agent(settings: Settings) -> None:
    """The agent may use such an id, and its job sees the store."""
    record = Client(settings, lambda _: None, of_server=True).submit(
        "delete", job_id="cs-delete-1", **ONE, stores=[STORE]
    )
    assert STORE in Stores(with_server_names(settings, record.job, record.job_id, record.request))
