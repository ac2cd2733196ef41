"""The state of browser uploads: the answers are the recorded ones, during, after and without an upload."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ssvm_worker.cloudstack.frame import RawMessage
from tests import images
from tests.cloudstack_commands import agent_settings, asker, vector
from tests.cloudstack_uploads import UUID, connect_agent, form, post, signed
from tests.servers.service import Service
from tests.unit.cloudstack.recorded import DATA, conversation
from tests.uploads import stored
from tests.waiting import SLOWNESS, until

IMAGE = images.mbr(6 << 20)
Ask = Callable[[RawMessage], RawMessage]


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    found = start_service(cloudstack=True)
    connect_agent(found)
    return found


@pytest.fixture
def ask(service: Service) -> Ask:
    return asker(agent_settings(service.settings))


def status(**changed: Any) -> RawMessage:
    return vector("req-upload-status-template", entityUuid=UUID, **changed)


@contextmanager
def sending(service: Service, size: int = 3 << 20) -> Iterator[socket.socket]:
    """Send *size* bytes of an upload, and keep the connection while the block runs."""
    body, kind = form(IMAGE)
    given = signed(service) | {"Content-Type": kind, "Host": service.url.partition("//")[2]}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as peer:
        peer.sendall(f"POST /upload/{UUID} HTTP/1.1\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode())
        peer.sendall(body[:size])
        yield peer


def recorded(state: str) -> dict[str, Any]:
    """Return the first answer of the Java agent with that state."""
    for path in sorted((DATA / "conversations").glob("real-ssvm-*")):
        for each in conversation(path):
            if each.name == "UploadStatusAnswer" and each.frame().messages[0].content.get("status") == state:
                return each.frame().messages[0].content
    raise LookupError(state)


def test_unknown(ask: Ask) -> None:
    """Before the browser sends, the answer is that of the Java agent."""
    answer = ask(status())
    assert answer.name == vector("ans-upload-status-unknown").name
    assert answer.content == recorded("UNKNOWN") | {"contextMap": answer.content["contextMap"]}


def test_completed(service: Service, ask: Ask) -> None:
    """A complete upload has its sizes and its place, as often as the server asks."""
    assert post(service, IMAGE, signed(service)).status == 200
    answers = [ask(status()).content for _ in range(2)]
    assert answers[0] == answers[1]
    shown = {name: answers[0][name] for name in recorded("COMPLETED") if name not in ("ovfInformationTO", "details")}
    assert shown.keys() <= answers[0].keys()
    assert answers[0]["status"] == "COMPLETED"
    sizes = (answers[0]["virtualSize"], answers[0]["physicalSize"], answers[0]["downloadPercent"])
    assert sizes == (len(IMAGE), len(IMAGE), 100)
    assert (service.store / answers[0]["installPath"]).read_bytes() == IMAGE


def test_volume(service: Service, ask: Ask) -> None:
    """An upload of a volume is complete at the place of a volume."""
    parameters = signed(service, absolutePath="volumes/1/3", type="VOLUME", checksum=hashlib.md5(IMAGE).hexdigest())
    assert post(service, IMAGE, parameters).status == 200
    answer = ask(status(entityType="Volume")).content
    assert (answer["status"], answer["installPath"]) == ("COMPLETED", "volumes/1/3/3.raw")
    assert (service.store / "volumes/1/3/volume.properties").exists()


def test_refused(service: Service, ask: Ask) -> None:
    """A refused file is an error with the reason."""
    assert post(service, IMAGE, signed(service, imageFormat="QCOW2")).status == 422
    answer = ask(status()).content
    assert answer.keys() == vector("ans-upload-status-error-msg").content.keys()
    assert (answer["status"], answer["result"], "qcow2" in answer["details"]) == ("ERROR", False, True)


def test_percent(service: Service, ask: Ask) -> None:
    """During the upload, the answer has the received bytes and their share."""
    with sending(service, 1 << 20) as peer:

        def send_more() -> bool:
            peer.sendall(bytes(8 << 10))
            time.sleep(0.02 * SLOWNESS)  # the heartbeat must store the progress before the file ends
            return ask(status()).content["downloadPercent"] > 15

        until(send_more, "the server sees the progress")
        answer = ask(status()).content
    assert (answer["status"], answer["result"]) == ("IN_PROGRESS", True)
    assert 1 << 20 <= answer["physicalSize"] < len(IMAGE)
    assert answer["downloadPercent"] < 100


def test_abort(service: Service, ask: Ask) -> None:
    """The server ends a running upload, of which nothing stays, and which cannot begin again."""
    with sending(service):
        until(lambda: ask(status()).content["status"] == "IN_PROGRESS", "the upload runs")
        ask(status(abort=True))
        until(lambda: ask(status()).content["status"] == "ERROR", "the upload has ended")
    until(lambda: stored(service) == [], "nothing is left")
    assert post(service, IMAGE, signed(service)).status == 410


def test_abort_before(service: Service, ask: Ask) -> None:
    """The server ends an upload that has not begun."""
    assert ask(status(abort=True)).content["status"] == "ERROR"
    assert post(service, IMAGE, signed(service)).status == 410
    assert stored(service) == []


def test_interrupted(service: Service, ask: Ask) -> None:
    """An upload whose client has left is an error: the server deletes the template, so it cannot continue."""
    with sending(service):
        until(lambda: ask(status()).content["status"] == "IN_PROGRESS", "the upload runs")
    until(lambda: ask(status()).content["status"] == "ERROR", "the upload has ended")
    assert "disconnected" in ask(status()).content["details"]
    assert post(service, IMAGE, signed(service)).status == 410
    assert stored(service) == []


@pytest.mark.parametrize("uuid", ["", "../x", "a b", "x" * 300])
def test_invalid_uuid(ask: Ask, uuid: str) -> None:
    """An invalid UUID is refused."""
    assert not ask(vector("req-upload-status-template", entityUuid=uuid)).content["result"]
