"""A download command becomes one job, even if a server repeats it, and its answers follow the ledger."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.cloudstack.commands.downloads import WantedDownload
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.jobs_to_end import start_job
from ssvm_worker.cloudstack.messages import DownloadCommand, decode
from ssvm_worker.ledger.record import Record
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.wiring.assembly import open_ledger, shown
from ssvm_worker.wiring.server_names import with_server_names
from tests.servers.broker import Broker

from .agents import NFS, PLACE, Agent, settings_of

COMMAND: dict[str, Any] = {
    "hvm": False,
    "description": "A test/template",
    "maxDownloadSizeInBytes": 53687091200,
    "id": 202,
    "resourceType": "TEMPLATE",
    "installPath": "template/tmpl/2/202/",
    "_store": NFS,
    "followRedirects": False,
    "url": "http://images.example.test/a.qcow2?x=1",
    "format": "QCOW2",
    "accountId": 2,
    "name": "202-2-aaaa",
    "secUrl": PLACE,
}
BEAT_S = 60.0


class Zone(Agent):
    """An agent, and the worker's part of the ledger."""

    def __init__(self, broker: Broker, directory: Path, places: Iterable[str] = (PLACE,)) -> None:
        self.settings = settings_of(broker, directory, cloudstack={"stores": dict.fromkeys(places, "primary")})
        self.store = directory / "store"
        super().__init__(self.settings)
        self.ledger = open_ledger(self.settings)

    def download(self, **changes: Any) -> dict[str, Any]:
        return self.send("DownloadCommand", **(COMMAND | changes))

    def progress(self, request: str, job_id: str | None, **changes: Any) -> dict[str, Any]:
        return self.send("DownloadProgressCommand", **(COMMAND | changes | {"request": request, "jobId": job_id}))

    def records(self) -> list[Record]:
        return self.ledger.page()

    def run(self, **outcome: Any) -> None:
        """End the only queued job."""
        (record,) = self.ledger.page(state="queued")
        claim = self.ledger.claim(record.job_id, "w")
        assert claim
        self.ledger.finish(claim, **outcome)

    def store_artifact(self, prefix: str = "template/tmpl/2/202") -> None:
        store = FileStore("primary", self.store)
        artifact = Artifact.of_prefix(prefix)
        put_bytes(store, artifact.key("202.qcow2"), b"abc", Owner())
        facts = {"format": "qcow2", "virtual_size": 1 << 30}
        source = {"digests": ["sha256:aa", "sha512:bb"], "url": ""}
        manifest = Manifest(
            artifact, "j", (Entry("202.qcow2", 3, "sha256:aa", facts=facts),), source, {"unique_name": "n"}
        )
        write_manifest(store, manifest, Owner())


_DOWNLOAD = "org.apache.cloudstack.storage.command.DownloadCommand"


@pytest.fixture
def zone(broker: Broker, tmp_path: Path) -> Iterator[Zone]:
    zone = Zone(broker, tmp_path)
    yield zone
    zone.ledger.close()


def test_submit(zone: Zone) -> None:
    """The first answer has the job id and no progress; the job has the content of the command."""
    answer = zone.download()
    (record,) = zone.records()
    assert answer["class"] == "DownloadAnswer"
    assert (answer["jobId"], answer["downloadStatus"], answer["downloadPct"]) == (record.job_id, "NOT_DOWNLOADED", 0)
    assert record.request == {
        "url": COMMAND["url"],
        "account": "2",
        "id": "202",
        "name": "A test_template",
        "unique_name": "202-2-aaaa",
        "format": "qcow2",
        "max_bytes": 53687091200,
        "keep_package": True,
        "credentials": record.job_id,
        "job_id": record.job_id,
    }


def test_same_command(zone: Zone) -> None:
    """The same command is the same job, also if the server's limits and descriptions have changed."""
    first = zone.download()
    second = zone.download(description="other", maxDownloadSizeInBytes=1, installPath="template//tmpl/2/202")
    assert first["jobId"] == second["jobId"]
    assert len(zone.records()) == 1


@pytest.mark.parametrize(
    "change", [{"url": "http://b/"}, {"installPath": "template/tmpl/2/203"}, {"checksum": "a" * 32}]
)
def test_other_command(zone: Zone, change: dict[str, Any]) -> None:
    """Another URL, path or checksum is another job."""
    assert zone.download()["jobId"] != zone.download(**change)["jobId"]


@pytest.mark.parametrize("job_id", ["5a0aee03-0000-4000-8000-000000000000", "jobid0000", None])
@pytest.mark.parametrize("request_", ["GET_STATUS", "GET_OR_RESTART", "RESTART"])
def test_lost_job(zone: Zone, request_: str, job_id: str | None) -> None:
    """A progress request with any job id attaches to the download; the answer has an id that the server accepts."""
    answer = zone.progress(request_, job_id)
    (record,) = zone.records()
    kept = job_id and not (job_id == "jobid0000" and request_ == "GET_OR_RESTART")
    assert answer["jobId"] == (job_id if kept else record.job_id)
    assert answer["downloadStatus"] == "NOT_DOWNLOADED"


def test_progress(zone: Zone) -> None:
    """A running job has its percentage, at most 99, and its bytes so far."""
    job_id = zone.download()["jobId"]
    claim = zone.ledger.claim(job_id, "w")
    assert claim
    zone.ledger.beat(claim, {"stage": "download", "bytes": 870, "total": 1000})
    answer = zone.progress("GET_STATUS", job_id)
    assert (answer["downloadStatus"], answer["downloadPct"], answer["templatePhySicalSize"]) == (
        "DOWNLOAD_IN_PROGRESS",
        87,
        870,
    )
    zone.ledger.beat(claim, {"stage": "committing", "bytes": 1000, "total": 1000})
    assert zone.progress("GET_STATUS", job_id)["downloadPct"] == 99


def test_done(zone: Zone) -> None:
    """A finished download is answered from its manifest, with the fields of the Java agent's answer."""
    job_id = zone.download()["jobId"]
    zone.store_artifact()
    zone.run(state="succeeded", result={})
    for answer in (zone.progress("GET_STATUS", job_id), zone.progress("PURGE", job_id), zone.download()):
        text = answer.pop("errorString")
        assert text.startswith("Install completed successfully at ")
        assert answer.pop("details") == text
        assert answer == {
            "class": "DownloadAnswer",
            "jobId": job_id,
            "downloadPct": 100,
            "downloadStatus": "DOWNLOADED",
            "downloadPath": "template/tmpl/2/202",
            "installPath": "template/tmpl/2/202/202.qcow2",
            "templateSize": 1 << 30,
            "templatePhySicalSize": 3,
            "checkSum": "{SHA-256}aa",
            "result": True,
            "contextMap": {},
            "wait": 0,
            "bypassHostMaintenance": False,
        }


def test_checksum_algorithm(zone: Zone) -> None:
    """The answer has the digest in the algorithm of the given checksum."""
    given = "{SHA-512}" + "bb" * 64
    job_id = zone.download(checksum=given)["jobId"]
    zone.store_artifact()
    zone.run(state="succeeded", result={})
    assert zone.progress("GET_STATUS", job_id, checksum=given)["checkSum"] == "{SHA-512}bb"


def test_deleted_since(zone: Zone) -> None:
    """A finished download whose artifact was deleted is done again, under another id; repetitions attach to it."""
    first = zone.download()["jobId"]
    zone.run(state="succeeded", result={})
    second = zone.download()
    assert second["jobId"] == first, "the id of the content stays"
    assert {each.job_id for each in zone.records()} == {first, f"{first}.1"}
    assert zone.download()["downloadStatus"] == "NOT_DOWNLOADED"
    assert len(zone.records()) == 2


def test_purge(zone: Zone) -> None:
    """PURGE and ABORT submit nothing: not an unknown download, and not one whose template was deleted just before."""
    requests = ("PURGE", "ABORT")
    nothing = ["UNKNOWN", "NOT_DOWNLOADED"]
    assert [zone.progress(each, "x")["downloadStatus"] for each in requests] == nothing
    assert zone.records() == []
    job_id = zone.download()["jobId"]
    zone.run(state="succeeded", result={})
    assert [zone.progress(each, job_id)["downloadStatus"] for each in requests] == nothing
    assert len(zone.records()) == 1


def end(zone: Zone, job_id: str, ending: str) -> None:
    """End the download, or decide its end."""
    claim = zone.ledger.claim(job_id, "w") if ending != "cancelled in the queue" else None
    if claim and ending == "succeeded":
        zone.store_artifact()
        zone.ledger.finish(claim, "succeeded", result={})
    elif claim and ending == "failed":
        zone.ledger.finish(claim, "failed", error={"message": "The source answers 404"})
    else:
        zone.ledger.cancel(job_id, "a user")
    if claim and ending == "cancelled, its leftovers are next":
        zone.ledger.release(claim, None)


@pytest.mark.parametrize(
    ("ending", "status", "text"),
    [
        ("succeeded", "DOWNLOADED", "Install completed"),
        ("failed", "DOWNLOAD_ERROR", "404"),
        ("cancelled in the queue", "DOWNLOAD_ERROR", "cancelled by a user"),
        ("cancelled while it runs", "DOWNLOAD_ERROR", "cancelled by a user"),
        ("cancelled, its leftovers are next", "DOWNLOAD_ERROR", "cancelled by a user"),
    ],
)
def test_no_answer_after_the_end_looks_unfinished(zone: Zone, ending: str, status: str, text: str) -> None:
    """When the end of a download is decided, each request about it is answered with this end."""
    job_id = zone.download()["jobId"]
    end(zone, job_id, ending)
    for request in ("GET_STATUS", "GET_OR_RESTART", "ABORT", "PURGE", "GET_STATUS"):
        answer = zone.progress(request, job_id)
        assert (answer["downloadStatus"], text in answer["errorString"]) == (status, True), request
    assert len(zone.records()) == 1


@pytest.mark.parametrize("ending", ["cancelled in the queue", "cancelled while it runs"])
def test_after_a_cancel(zone: Zone, ending: str) -> None:
    """A new command for a cancelled download is a new job, even while the cancelled one still ends."""
    job_id = zone.download()["jobId"]
    end(zone, job_id, ending)
    for _ in range(2):
        assert zone.download()["downloadStatus"] == "NOT_DOWNLOADED"
    assert zone.ledger.get(f"{job_id}.1").state == "queued"
    assert zone.progress("GET_STATUS", job_id)["downloadStatus"] == "NOT_DOWNLOADED"
    assert len(zone.records()) == 2


def test_no_command_attaches_to_a_cancelled_job(zone: Zone) -> None:
    """A command that needs the end of a job gets a new job if the first only cleans up."""
    request = {"kind": "template", "account": "2", "id": "202", "stores": ["primary"]}
    first = start_job(zone.services, "delete", "cs-delete-x", request)
    assert start_job(zone.services, "delete", "cs-delete-x", request) == first
    assert zone.ledger.claim(first, "w")
    zone.ledger.cancel(first, "a user")
    assert start_job(zone.services, "delete", "cs-delete-x", request) == f"{first}.1"


def test_failed(zone: Zone) -> None:
    """A failed download has its reason for users, and result true as in the Java agent's answer."""
    job_id = zone.download()["jobId"]
    zone.run(state="failed", error={"message": "The source answers 404 [http://a]"})
    for request in ("GET_STATUS", "GET_OR_RESTART", "PURGE"):
        answer = zone.progress(request, job_id)
        assert (answer["downloadStatus"], answer["result"]) == ("DOWNLOAD_ERROR", True)
        assert answer["errorString"] == answer["details"] == "The source answers 404 [http://a]"


@pytest.mark.parametrize("request_", ["DownloadCommand", "RESTART"])
def test_again(zone: Zone, request_: str) -> None:
    """A new command for a failed download queues its job again."""
    job_id = zone.download()["jobId"]
    zone.run(state="failed", error={"message": "x"})
    answer = zone.download() if request_ == "DownloadCommand" else zone.progress(request_, job_id)
    assert answer["downloadStatus"] == "NOT_DOWNLOADED"
    assert zone.ledger.get(job_id).state == "queued"


@pytest.mark.parametrize("request_", ["ABORT", "PURGE"])
def test_abort(zone: Zone, request_: str) -> None:
    """ABORT, and PURGE of an account at its limit, cancel an unfinished download, and may be repeated."""
    assert zone.progress(request_, None, installPath="../x")["result"] is True
    job_id = zone.download()["jobId"]
    for _ in range(2):
        assert "cancelled" in zone.progress(request_, job_id)["errorString"]
    record = zone.ledger.get(job_id)
    assert (record.state, record.cancelled_by) == ("cancelled", "CloudStack")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"installPath": "../../etc"}, "key"),
        ({"installPath": "template/tmpl/2/.."}, "key"),
        ({"installPath": "template/tmpl/2"}, "prefix"),
        ({"installPath": "volumes/2/31"}, "not one of a template"),
        ({"installPath": "template/tmpl/2/202", "resourceType": "VOLUME"}, "prefix"),
        ({"installPath": "snapshots/2/3/4"}, "not one of a template"),
        ({"installPath": "template/tmpl/2/202/a/b"}, "not one of"),
        ({"url": "gopher://a/b"}, "gopher"),
        ({"url": "file:///etc/shadow"}, "file"),
        ({"url": "store:cs-1/template/tmpl/2/1/x"}, "store"),
        ({"url": "s3://bucket/key"}, "s3"),
        ({"url": "http://[bad/"}, "malformed"),
        ({"checksum": "{SHA-256}00ff"}, "64 hex digits"),
        ({"format": "TAR"}, "format"),
        ({"_store": {"com.cloud.agent.api.to.SwiftTO": {"url": "http://s"}}}, "Swift"),
        ({"_store": None}, "no image store"),
        ({"resourceType": "SNAPSHOT", "installPath": "volumes/2/3"}, "not one of a snapshot"),
    ],
)
def test_refused(zone: Zone, change: dict[str, Any], text: str) -> None:
    """A command that cannot become a job is a failed download with the reason."""
    answer = zone.download(**change)
    assert (answer["class"], answer["downloadStatus"]) == ("DownloadAnswer", "DOWNLOAD_ERROR")
    assert text in answer["errorString"]
    assert zone.records() == []


def test_broker_away(tmp_path: Path) -> None:
    """While the broker is away the download is not an error; the server asks again."""
    agent = Agent(settings_of(Broker("redis://127.0.0.1:1/0", ""), tmp_path))
    answer = agent.send("DownloadCommand", **COMMAND)
    assert (answer["class"], answer["downloadStatus"]) == ("DownloadAnswer", "NOT_DOWNLOADED")
    assert answer["jobId"].startswith("cs-download-")


SECRET: dict[str, Any] = {
    "auth": {"userName": "cloud", "password": "hunter2"},
    "_proxy": {"_host": "proxy.example.test", "_port": 3128, "_userName": "pu", "_password": "hunter3"},
    "url": "http://u:hunter4@images.example.test/a.qcow2",
}


def test_secrets(zone: Zone) -> None:
    """No record has a password; the worker gets them from the ledger, with the server's internal sites."""
    zone.services.web.set_internal_sites(["10.1.0.0/16", "nonsense"])
    zone.download(**SECRET)
    (record,) = zone.records()
    assert "hunter" not in json.dumps(record.request)
    assert "hunter" not in json.dumps(shown(record))
    settings = with_server_names(zone.settings, record.job, record.job_id, record.request)
    section = settings.credentials[record.job_id]
    assert (section.username, section.hosts) == ("cloud", ("images.example.test",))
    assert section.password
    assert section.password.get_secret_value() == "hunter2"
    assert settings.download.proxy
    assert settings.download.proxy.get_secret_value() == "http://pu:hunter3@proxy.example.test:3128"
    assert settings.download.allow_networks == ("10.1.0.0/16",)
    assert settings.download.max_redirects == 0


def test_password_in_url(zone: Zone) -> None:
    """The user and password of a URL are credentials of its host, and not a part of the job's id."""
    first = zone.download(url="http://u:hunter4@images.example.test/a.qcow2")["jobId"]
    second = zone.download(url="http://u:hunter5@images.example.test/a.qcow2")["jobId"]
    assert first == second
    (record,) = zone.records()
    section = with_server_names(zone.settings, record.job, record.job_id, record.request).credentials[record.job_id]
    assert section.password
    assert section.password.get_secret_value() == "hunter4", "a running download keeps its login"


def test_redirects(zone: Zone) -> None:
    """Redirects are followed if the server says so, and if it is too old to say anything."""
    followed = []
    for change in ({"followRedirects": True}, {"followRedirects": None}, {"followRedirects": False}):
        command = decode(RawMessage(_DOWNLOAD, {k: v for k, v in (COMMAND | change).items() if v is not None}))
        assert isinstance(command, DownloadCommand)
        followed.append(WantedDownload(command, zone.services).connection()["follow_redirects"])
    assert followed == [True, True, False]


def test_round_trips(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new download and a repeated command ask the broker once, because a hundred commands arrive at once."""
    sent: list[int] = []
    send = redis.connection.AbstractConnection.send_packed_command

    def counted(connection: Any, *args: Any, **options: Any) -> None:
        sent.append(threading.get_ident())
        send(connection, *args, **options)

    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", counted)
    zone.download(id=1, installPath="template/tmpl/2/1")  # opens the connections
    for number in (2, 2):
        sent.clear()
        assert zone.download(id=number, installPath=f"template/tmpl/2/{number}")["jobId"]
        assert sent.count(threading.get_ident()) == 1
    sent.clear()
    several = [RawMessage(_DOWNLOAD, COMMAND | {"installPath": f"template/tmpl/2/{number}"}) for number in range(3, 9)]
    assert all(zone.dispatch.answer_together(several))
    assert sent.count(threading.get_ident()) == 1


def test_together(zone: Zone) -> None:
    """New downloads to a known store are answered together, as if they came alone; all other commands are not."""
    old, new, refused = [
        RawMessage(_DOWNLOAD, COMMAND | change)
        for change in (
            {},
            {"installPath": "template/tmpl/2/9"},
            {"installPath": "template/tmpl/2/8", "url": "file:///"},
        )
    ]
    assert zone.dispatch.answer_together([old]) == [None], "its store needs a question to the DNS"
    zone.dispatch(old)
    health = RawMessage("com.cloud.agent.api.CheckHealthCommand")
    first, *others = zone.dispatch.answer_together([new, new, old, refused, health, RawMessage("x.Unknown")])
    assert others == [None] * 5
    assert first == zone.dispatch(new)
    assert len(zone.records()) == 2
