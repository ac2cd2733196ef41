"""The example receivers of callbacks as real processes: they accept our callbacks, and refuse forged and old ones."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.neighbours import ROOT, missing
from tests.servers.broker import Broker
from tests.servers.receiver import Receiver
from tests.unit.ledger.test_callbacks import Ledger, ended, outbox, send_all

EXAMPLES = {"python": "python/receive.py", "node": "node/receive.mjs"}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return the process of an example receiver whose secret is sesame."""
    program = sys.executable if request.param == "python" else shutil.which("node")
    if not program:
        missing("node", "install nodejs")
    (tmp_path / "secret").write_text("sesame\n")
    command = [program, str(ROOT / "docs/examples" / EXAMPLES[request.param]), "0", str(tmp_path / "secret")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def post(url: str, headers: dict[str, str], body: bytes) -> int:
    """Send a POST and return the status."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/", body, headers)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def signed(at: float, body: bytes) -> dict[str, str]:
    """Return the headers of a callback that a worker sends at that time."""
    mac = hmac.new(b"sesame", f"{at:.0f}.".encode() + body, hashlib.sha256)
    return {"X-SSVM-Timestamp": f"{at:.0f}", "X-SSVM-Signature-V2": f"sha256={mac.hexdigest()}"}


def test_example(broker: Broker, example: subprocess.Popen[str]) -> None:
    """A receiver prints a worker's callback, and refuses its replay, another time, old and unsigned ones."""
    assert example.stdout
    url = example.stdout.readline().strip()
    with Ledger(broker.url, prefix=broker.prefix) as ledger, Receiver() as recorder:
        ended(ledger, recorder.url)
        send_all(outbox(ledger, secret="sesame"), ledger)
    ((headers, body),) = recorder.got
    sent = {name: value for name, value in headers.items() if name.startswith("X-SSVM-")}
    later = sent | {"X-SSVM-Timestamp": str(int(sent["X-SSVM-Timestamp"]) + 1)}
    only_old = {name: value for name, value in sent.items() if name not in ("X-SSVM-Timestamp", "X-SSVM-Signature-V2")}
    now = time.time()
    tries = {
        "first": (sent, body, 204),
        "replay": (sent, body, 409),
        "another time": (later, body, 401),
        "another body": (sent, body + b" ", 401),
        "only the old signature": (only_old, body, 401),
        "old": (signed(now - 3600, body), body, 401),
        "of the future": (signed(now + 3600, body), body, 401),
        "no number": (sent | {"X-SSVM-Timestamp": "soon"}, body, 401),
        "sent again": (signed(now - 100, body), body, 204),
    }
    found = {name: post(url, given, data) for name, (given, data, _) in tries.items()}
    assert found == {name: status for name, (_, _, status) in tries.items()}
    assert example.stdout.readline().split() == ["j1", "succeeded"]
