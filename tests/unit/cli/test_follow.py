"""`ssvm job ID --follow` on a terminal shows a bar, then the result, and ends with the job's exit status."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from tests.servers.broker import Broker
from tests.waiting import PATIENCE_S

HALF = {"stage": "download", "bytes": 50 << 20, "total": 100 << 20, "rate": 7 << 20}
FAILURE = {"error": "SourceNotFound", "message": "There is nothing (status 404)"}


class Terminal:
    """A command on its own terminal; *seen* is the output so far."""

    def __init__(self, *command: str, environ: dict[str, str]) -> None:
        self.seen = ""
        self._shown = threading.Condition()
        near, far = pty.openpty()
        # A process in the background, as this one may be, passes on that it ignores Ctrl-C.
        self.process = subprocess.Popen(
            command,
            stdin=far,
            stdout=far,
            stderr=far,
            env=os.environ | environ,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(far)
        self._reader = threading.Thread(target=self._read, args=(near,))
        self._reader.start()

    def _read(self, near: int) -> None:
        with os.fdopen(near, "rb", buffering=0) as screen:
            while piece := self._piece(screen.read):
                with self._shown:
                    self.seen += piece.decode(errors="replace")
                    self._shown.notify_all()

    @staticmethod
    def _piece(read: Callable[[int], bytes]) -> bytes:
        try:
            return read(4096)
        except OSError:  # how Linux reports that all writers have closed
            return b""

    def wait_for(self, text: str) -> None:
        """Wait until the terminal shows the text."""
        with self._shown:
            assert self._shown.wait_for(lambda: text in self.seen, PATIENCE_S), self.seen

    def ended(self) -> int:
        """Return the exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status


@pytest.fixture
def ledger(broker: Broker) -> Ledger:
    """Return a ledger with one running job."""
    ledger = Ledger(broker.url, prefix=broker.prefix, claim_s=600)
    ledger.submit(NewJob("tmpl-7", job="download", zone="zone1", lane="download", request={"url": "http://x/y"}))
    return ledger


@pytest.mark.parametrize(
    ("state", "outcome", "status", "told"),
    [
        ("succeeded", {"result": {"size": 104857600}}, 0, "succeeded  tmpl-7"),
        ("failed", {"error": FAILURE}, 1, "SourceNotFound: There is nothing"),
        ("cancelled", {"error": {"error": "Cancelled", "message": "Stopped by a user"}}, 130, "Cancelled: Stopped"),
    ],
)
def test_follow(
    ledger: Ledger, broker: Broker, state: str, outcome: dict[str, dict[str, object]], status: int, told: str
) -> None:
    """The bar shows stage, share and bytes of the running job, and the exit status is the job's."""
    with ledger:
        claim = ledger.claim("tmpl-7", "worker-1")
        assert claim
        ledger.beat(claim, HALF)
        terminal = Terminal(
            *(sys.executable, "-m", "ssvm_worker", "job", "tmpl-7", "--follow"),
            environ={"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix},
        )
        terminal.wait_for("tmpl-7  download  50 %  50 MiB of 100 MiB  7 MiB/s  7 s left  |")
        ledger.finish(claim, state, **outcome)
        assert terminal.ended() == status
        assert f"\n{told}" in terminal.seen


def test_ctrl_c(ledger: Ledger, broker: Broker) -> None:
    """Ctrl-C while waiting says that the job continues, and how to stop it."""
    environ = {"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix}
    with ledger:
        terminal = Terminal(*(sys.executable, "-m", "ssvm_worker", "job", "tmpl-7", "--follow"), environ=environ)
        terminal.wait_for("queued: no worker of zone zone1 is up")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 130
        assert "ssvm cancel tmpl-7" in terminal.seen
        assert ledger.get("tmpl-7").state == "queued"


def test_quiet(ledger: Ledger, broker: Broker) -> None:
    """With --quiet a terminal gets no bar, but the result."""
    environ = {"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix}
    with ledger:
        claim = ledger.claim("tmpl-7", "worker-1")
        assert claim
        ledger.finish(claim, "succeeded", result={"size": 1}, progress=HALF)
        terminal = Terminal(*(sys.executable, "-m", "ssvm_worker", "-q", "job", "tmpl-7", "--follow"), environ=environ)
        assert terminal.ended() == 0
    assert "MiB" not in terminal.seen
    assert "succeeded  tmpl-7" in terminal.seen
