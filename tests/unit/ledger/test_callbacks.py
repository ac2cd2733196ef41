"""Callbacks at a job's end: a real POST to a real server, repeated until it is accepted."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from ssvm_worker.config.schema import DownloadSection, RetrySection, Settings
from ssvm_worker.ledger.callbacks import Callbacks, CallbackSettings
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Callback, NewJob, Record
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.broker_url import redis_url
from ssvm_worker.wiring.assembly import shown
from tests.servers.broker import Broker
from tests.servers.receiver import Receiver

QUICK = RetrySection(first_delay_s=0.001, max_delay_s=0.001)


@pytest.fixture
def ledger(broker: Broker) -> Iterator[Ledger]:
    """Return a ledger."""
    with Ledger(broker.url, prefix=broker.prefix) as found:
        yield found


def ended(ledger: Ledger, url: str | None, state: str = "succeeded") -> None:
    """Return an ended job j1 with this callback URL."""
    ledger.submit(NewJob("j1", "download", "z", "download", {"url": "http://x/y?key=open"}, callback_url=url))
    claim = ledger.claim("j1", "w")
    assert claim
    ledger.finish(claim, state, result={"size": 5}, error={"error": "TooLarge"} if state == "failed" else None)


def outbox(ledger: Ledger, **settings: Any) -> Callbacks:
    """Return an outbox that retries at once."""
    here = {"policy": QUICK, "rule": AddressRule(("127.0.0.0/8",))}
    return Callbacks(ledger, CallbackSettings(**(here | settings)), shown)


def send_all(callbacks: Callbacks, ledger: Ledger) -> Callback:
    """Send until no callback is pending, and return the outcomes."""
    while ledger.get("j1").callback.state == "pending":
        callbacks.send_due()
    return ledger.get("j1").callback


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_delivered(ledger: Ledger, state: str) -> None:
    """Every end is sent, with the record as the body and its secrets masked."""
    with Receiver() as receiver:
        ended(ledger, receiver.url, state)
        assert send_all(outbox(ledger), ledger).state == "delivered"
    ((headers, body),) = receiver.got
    told = json.loads(body)
    assert (told["job_id"], told["state"], told["request"]["url"]) == ("j1", state, "http://x/y?***")
    assert (headers["Content-Type"], headers["X-SSVM-Job"]) == ("application/json", "j1")
    assert not {"X-SSVM-Signature", "X-SSVM-Signature-V2", "X-SSVM-Timestamp"} & headers.keys()


def test_signed_and_tried_again(ledger: Ledger) -> None:
    """A receiver that fails twice gets a third try, and every try is numbered and signed separately."""
    with Receiver(500, 503) as receiver:
        ended(ledger, receiver.url)
        assert send_all(outbox(ledger, secret="sesame"), ledger) == Callback(receiver.url, "delivered", 3, "")
    assert [headers["X-SSVM-Delivery-Attempt"] for headers, _ in receiver.got] == ["1", "2", "3"]
    for headers, body in receiver.got:
        right = hmac.new(b"sesame", body, hashlib.sha256).hexdigest()
        assert headers["X-SSVM-Signature"] == f"sha256={right}"
        right = hmac.new(b"sesame", headers["X-SSVM-Timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
        assert headers["X-SSVM-Signature-V2"] == f"sha256={right}"


def test_given_up(ledger: Ledger) -> None:
    """After max_tries the callback is given up, and the record keeps the last answer."""
    with Receiver(*[500] * 9) as receiver:
        ended(ledger, receiver.url)
        callback = send_all(outbox(ledger, max_tries=3), ledger)
    assert (callback.state, callback.tries, callback.error) == ("failed", 3, "the answer was 500")
    assert outbox(ledger).send_due() is False


@pytest.mark.parametrize("status", [301, 302, 307])
def test_redirect(ledger: Ledger, status: int) -> None:
    """A redirect is no delivery, and the record goes only to the requested URL."""
    with Receiver(status) as receiver:
        ended(ledger, receiver.url)
        assert send_all(outbox(ledger, max_tries=1), ledger).error == f"the answer was {status}"


def test_nobody_there(ledger: Ledger) -> None:
    """An unreachable receiver is tried again, and no error repeats the URL's secrets."""
    ended(ledger, "http://127.0.0.1:1/done?token=sesame")
    callback = send_all(outbox(ledger, max_tries=2), ledger)
    assert (callback.state, callback.tries) == ("failed", 2)
    assert "sesame" not in callback.error
    assert callback.error.startswith("no answer")


def test_nobody_asked(ledger: Ledger) -> None:
    """A job without a callback URL sends nothing."""
    ended(ledger, None)
    assert outbox(ledger).send_due() is False
    assert ledger.get("j1").to_dict()["callback"] is None


def test_survives_the_worker(ledger: Ledger) -> None:
    """If a worker is killed before it sends a callback, exactly one other worker sends it."""
    with Receiver() as receiver:
        ended(ledger, receiver.url)
        assert outbox(ledger).send_due() is True
        assert outbox(ledger).send_due() is False
    assert len(receiver.got) == 1


def test_one_sender(ledger: Ledger) -> None:
    """While one worker sends a callback, no other worker sends it."""
    ended(ledger, "http://127.0.0.1:1/")
    taken: Record | None = ledger.take_callback(60, "j1")
    assert taken
    assert ledger.take_callback(60, "j1") is None
    assert ledger.take_callback(60) is None


def test_deleted_by_hand(broker: Broker, ledger: Ledger) -> None:
    """A job whose record was deleted by hand is forgotten, and the next callback is sent."""
    with Receiver() as receiver, broker.client() as client:
        ended(ledger, "http://127.0.0.1:1/")
        client.delete(f"{broker.prefix}ssvm.ledger:ended:j1")
        ledger.submit(NewJob("j2", "download", "z", "download", {}, callback_url=receiver.url))
        ledger.cancel("j2", "ann")
        assert list(ledger.due_callbacks(10)) == ["j1", "j2"]
        assert ledger.take_callback(60, "j1") is None
        assert outbox(ledger).send_due() is True
        assert list(ledger.due_callbacks(10)) == []
    assert len(receiver.got) == 1


def test_retried_job_waits_for_its_new_end(ledger: Ledger) -> None:
    """A pending callback of a job that is retried is not sent before the new end."""
    with Receiver() as receiver:
        ended(ledger, receiver.url, "failed")
        ledger.retry("j1", "ann")
        assert outbox(ledger).send_due() is False
    assert receiver.got == []


def test_retried_job_tells_again(ledger: Ledger) -> None:
    """A retried job sends a callback at its new end."""
    with Receiver() as receiver:
        ended(ledger, receiver.url, "failed")
        send_all(outbox(ledger), ledger)
        ledger.retry("j1", "ann")
        claim = ledger.claim("j1", "w")
        assert claim
        ledger.finish(claim, "succeeded", result={})
        send_all(outbox(ledger), ledger)
    assert [json.loads(body)["state"] for _, body in receiver.got] == ["failed", "succeeded"]


class Peer:
    """A receiver on a bare socket, for answers that no HTTP server gives."""

    def __init__(self, pieces: Sequence[bytes], ends: bool) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._given = (pieces, ends)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/done"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        pieces, ends = self._given
        with suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                with sock:
                    sock.recv(1 << 16)
                    for piece in pieces:
                        sock.sendall(piece)
                    while not ends and not self._over.wait(0.02):
                        sock.sendall(b"a")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._server.close()


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        pytest.param([b"HTTP/1.1 200 OK\r\nX-"], False, id="a header without end"),
        pytest.param([b"HTTP/1.1 "], False, id="a status without end"),
        pytest.param([], False, id="no HTTP, without end"),
        pytest.param([b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000], True, id="a long header"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n" * 4000], False, id="interim answers without end"),
        pytest.param([b"HTTP/1.1 200 OK\r\n"], True, id="half a head"),
        pytest.param([b"220 ftp ready\r\n\r\n"], True, id="another protocol"),
        pytest.param([], True, id="nothing"),
    ],
)
def test_no_answer(ledger: Ledger, pieces: list[bytes], ends: bool) -> None:
    """An exchange ends at its deadline for any answer, and counts as a try without an answer."""
    with Peer(pieces, ends) as peer:
        ended(ledger, peer.url)
        callback = send_all(outbox(ledger, max_tries=1, timeout_s=1.0), ledger)
    assert (callback.state, callback.tries, callback.error) == ("failed", 1, "no answer")


def test_interim_answers(ledger: Ledger) -> None:
    """The final answer after interim answers counts."""
    pieces = [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early",
        b" Hints\r\nLink: x\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ]
    with Peer(pieces, ends=True) as peer:
        ended(ledger, peer.url)
        assert send_all(outbox(ledger), ledger).state == "delivered"


@pytest.mark.parametrize(
    ("url", "networks"),
    [
        ("http://127.0.0.1:{open}/", ()),
        ("http://127.0.0.1:1/", ()),
        ("http://localhost:1/", ()),
        ("http://[::ffff:127.0.0.1]:{open}/", ()),
        ("http://10.1.2.3/", ()),
        ("http://169.254.169.254/latest/meta-data", ("0.0.0.0/0", "::/0")),
        ("http://168.63.129.16/", ("168.63.129.16/32",)),
        ("http://[fd00:ec2::254]/", ("::/0",)),
    ],
)
def test_address_rule(ledger: Ledger, url: str, networks: tuple[str, ...]) -> None:
    """Callbacks reach only public and listed addresses, never metadata services, and reveal no open ports."""
    with Receiver() as receiver:
        ended(ledger, url.format(open=urlsplit(receiver.url).port))
        callback = send_all(outbox(ledger, max_tries=1, rule=AddressRule(networks)), ledger)
    assert receiver.got == []
    assert callback.error == "not sent: callback.allow_networks does not allow the address"


def test_default_rule() -> None:
    """Without their own setting, callbacks and uploads may use the networks of downloads."""
    assert CallbackSettings().rule == AddressRule()
    settings = Settings(download=DownloadSection(allow_networks=("10.0.0.0/8",)))
    assert settings.networks_of(settings.callback) == settings.networks_of(settings.upload) == ("10.0.0.0/8",)
    closed = settings.model_copy(update={"callback": settings.callback.model_copy(update={"allow_networks": ()})})
    assert closed.networks_of(closed.callback) == Settings().networks_of(Settings().callback) == ()


@pytest.mark.parametrize("url", ["http://[x", "http://h:port/", "ftp://h/", "", "http://a..b/"])
def test_odd_url_counts_as_a_try(ledger: Ledger, url: str) -> None:
    """A callback URL of an older version that cannot be used is given up like any other."""
    ended(ledger, url or "x")
    callback = send_all(outbox(ledger, max_tries=2), ledger)
    assert (callback.state, callback.tries) == ("failed", 2)


def test_any_error_counts_as_a_try(ledger: Ledger) -> None:
    """A record that cannot be shown uses up its tries, and is not tried forever."""

    def show(record: Record) -> dict[str, Any]:
        raise RuntimeError(record.job_id)

    ended(ledger, "http://127.0.0.1:1/")
    callbacks = Callbacks(ledger, CallbackSettings(policy=QUICK, max_tries=2), show)
    assert send_all(callbacks, ledger).state == "failed"


def test_deleted_record(ledger: Ledger, broker: Broker) -> None:
    """A record that was deleted by hand delays no callback."""
    with Receiver() as receiver:
        ended(ledger, receiver.url)
        with redis.Redis.from_url(redis_url(broker.url), decode_responses=True) as client:
            client.zadd(f"{broker.prefix}ssvm.ledger:callbacks", {"gone": 1.0, "also": 2.0})
        assert outbox(ledger).send_due() is True
        assert outbox(ledger).send_due() is False
    assert len(receiver.got) == 1
