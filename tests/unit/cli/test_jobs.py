"""`ssvm jobs | job | retry | cancel`: what is shown to people, filters, prefixes of ids, and changes of many jobs."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ssvm_worker.cli import main
from ssvm_worker.cli.job_text import table
from ssvm_worker.errors import ChecksumMismatch, StoreFull, WorkerError
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from ssvm_worker.ledger.workers import WorkerInfo, WorkerRegistry
from tests.servers.broker import Broker
from tests.unit.cli.test_follow import Terminal

Run = Callable[..., tuple[int, str]]
LONG = "4f2a9c00000000000000000000000001"
OTHER = "4f2b0000000000000000000000000002"


@pytest.fixture
def ledger(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Return the ledger of the commands."""
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)
    return Ledger(broker.url, prefix=broker.prefix)


@pytest.fixture
def ssvm(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; return its exit status and what it printed, errors included."""

    def run(*argv: str) -> tuple[int, str]:
        status = main(argv)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def put(ledger: Ledger, job_id: str, account: str, error: WorkerError | None = None, zone: str = "zone1") -> None:
    """Submit a download, and let it fail with the error."""
    request = {"url": "http://x/y?key=s3cret", "account": account, "id": "7", "job_id": job_id, "stores": ["primary"]}
    ledger.submit(NewJob(job_id, job="download", zone=zone, lane="download", request=request, account=account))
    if error:
        claim = ledger.claim(job_id, "worker-1")
        assert claim
        ledger.finish(claim, "failed", error=error.as_dict())


MISMATCH = ChecksumMismatch("The digest differs", "http://x/y", "Correct the checksum")
FULL = StoreFull("The store is full", "primary", "Delete what is not needed")


def test_list_for_people(ledger: Ledger, ssvm: Run) -> None:
    """A line of the list says what failed, why, whose it is, and since when."""
    put(ledger, "fail-sum", "2", MISMATCH)

    (head, line) = ssvm("jobs")[1].splitlines()

    assert head.split() == ["id", "job", "what", "state", "since", "why"]
    assert line.split()[:4] == ["fail-sum", "download", "2/7", "failed"]
    assert line.split(maxsplit=6)[5:] == ["s", "ChecksumMismatch: The digest differs"]


def test_waiting_job_says_why(ledger: Ledger, ssvm: Run) -> None:
    """A queued job without a worker says so, in the list and alone."""
    put(ledger, "waits", "2")

    assert ssvm("jobs")[1].rstrip().endswith("no worker of zone zone1 is up")
    assert "\nwaits      no worker of zone zone1 is up" in ssvm("job", "waits")[1]


def test_one_job_for_people(ledger: Ledger, ssvm: Run) -> None:
    """A job is about ten lines without a secret, and the last one is the remedy."""
    put(ledger, LONG, "2", MISMATCH)

    lines = ssvm("job", LONG)[1].splitlines()

    assert 8 <= len(lines) <= 14
    assert lines[-1] == f"remedy     Correct the checksum. Then: ssvm retry {LONG}"
    assert "s3cret" not in "\n".join(lines)


def test_missing_stores(ledger: Ledger, ssvm: Run) -> None:
    """A job says which store lacks its artifact, and which job copies it there."""
    request = {"url": "http://x/y", "account": "2", "id": "7", "job_id": LONG}
    ledger.submit(NewJob(LONG, job="download", zone="zone1", lane="download", request=request))
    claim = ledger.claim(LONG, "w")
    assert claim
    ledger.finish(claim, "succeeded", result={"owed": {"archive": FULL.as_dict() | {"copy_job": "copy-1"}}})

    missing = "store archive: StoreFull: The store is full. The job copy-1 copies it"
    assert f"missing    {missing}" in ssvm("job", LONG)[1]
    assert f"\nmissing: {missing}" in ssvm("job", LONG, "--follow")[1]


@pytest.mark.parametrize("width", [80, 120])
def test_fits_the_terminal(width: int) -> None:
    """No line is wider than the terminal, and the reason is visible at any width."""
    row = {"id": "4f2a9c000000", "job": "download", "zone": "z", "what": "2/" + "x" * 60, "state": "failed"}
    row |= {"since": "12 min", "why": "ChecksumMismatch: " + "y" * 200}

    lines = list(table([row, row], width))

    assert max(map(len, lines)) <= width
    assert sum("ChecksumMismatch: yyy" in each for each in lines) == 2


def test_on_a_terminal(ledger: Ledger, broker: Broker) -> None:
    """A terminal shows the beginning of a generated id, which the other commands take, and a coloured state."""
    put(ledger, LONG, "2", MISMATCH)
    environ = {"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix, "COLUMNS": "80", "TERM": "xterm"}

    terminals = [
        Terminal(sys.executable, "-m", "ssvm_worker", "jobs", environ=environ | {"NO_COLOR": no_colour})
        for no_colour in ("", "1")
    ]

    assert [each.ended() for each in terminals] == [0, 0]
    assert f"\n{LONG[:12]}  download  2/7   \x1b[31mfailed\x1b[0m" in terminals[0].seen
    assert f"\n{LONG[:12]}  download  2/7   failed" in terminals[1].seen
    one = Terminal(sys.executable, "-m", "ssvm_worker", "job", LONG[:12], environ=environ | {"NO_COLOR": ""})
    assert one.ended() == 0
    assert f"job        {LONG} (download)" in one.seen
    assert "state      \x1b[31mfailed\x1b[0m for " in one.seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--account", "2"], ["a", "c"]),
        (["--error", "StoreFull"], ["b"]),
        (["--state", "queued"], ["c"]),
        (["--zone", "zone2"], ["c"]),
        (["--job", "upload"], []),
        (["--since", "1h", "--state", "failed"], ["a", "b"]),
        (["--until", "1h"], []),
        (["--since", "2099-01-01"], []),
        (["--account", "2", "--error", "ChecksumMismatch"], ["a"]),
        (["--limit", "1", "--offset", "1"], ["b"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_filters(ledger: Ledger, ssvm: Run, options: list[str], expected: list[str]) -> None:
    """A list has the jobs that meet all conditions."""
    put(ledger, "a", "2", MISMATCH)
    put(ledger, "b", "3", FULL)
    put(ledger, "c", "2", zone="zone2")

    rows: list[dict[str, Any]] = json.loads(ssvm("jobs", "--json", *options)[1].splitlines()[0])

    assert sorted(row["job_id"] for row in rows) == expected


def test_unique_beginning(ledger: Ledger, ssvm: Run) -> None:
    """The unique beginning of an id names the job, and a pattern is no beginning."""
    put(ledger, LONG, "2", MISMATCH)
    put(ledger, OTHER, "2", FULL)

    assert LONG in ssvm("job", "4f2a")[1]
    assert ssvm("retry", "4f2b")[1].strip() == f"queued again: {OTHER}"
    assert ssvm("cancel", "4f2b")[1].strip() == f"asked to stop: {OTHER}"
    status, told = ssvm("job", "4f2*")
    assert (status, "no such job" in told) == (1, True)  # no pattern


@pytest.mark.parametrize("command", [["job"], ["retry"], ["cancel"], ["jobs", "--parts"]])
def test_short_or_ambiguous_beginning(ledger: Ledger, ssvm: Run, command: list[str]) -> None:
    """A beginning of less than four characters, or of several ids, is wrong usage, and no job changes."""
    put(ledger, LONG, "2", MISMATCH)
    put(ledger, f"{LONG[:-1]}x", "2", MISMATCH)

    status, told = ssvm(*command, LONG[:3])
    assert (status, "needs 4 characters" in told) == (2, True)
    status, told = ssvm(*command, LONG[:4])
    assert (status, LONG in told, f"{LONG[:-1]}x" in told) == (2, True, True)
    assert {each.state for each in ledger.page()} == {"failed"}


def test_retry_that_will_fail_again(ledger: Ledger, ssvm: Run) -> None:
    """A retry of an error of the request or the bytes warns and names the remedy; one of another error says nothing."""
    put(ledger, "sums", "2", MISMATCH)
    put(ledger, "full", "2", FULL)

    warning = "ssvm: sums will probably fail again with ChecksumMismatch: Correct the checksum"
    assert ssvm("retry", "sums") == (0, f"queued again: sums\n{warning}\n")
    assert ssvm("retry", "full") == (0, "queued again: full\n")
    assert ssvm("cancel", "sums")[0] == 0


def test_retry_that_is_due(ledger: Ledger, ssvm: Run, broker: Broker) -> None:
    """A job between two attempts says why it waits, and which error the last attempt had."""
    put(ledger, "again", "2")
    claim = ledger.claim("again", "w")
    assert claim
    ledger.release(claim, error=FULL.as_dict())

    assert "no worker of zone zone1 is up" in ssvm("jobs")[1]
    info = WorkerInfo("w1", "host", "zone1", ("download",), 4, "1.0", started=1.0, every_s=1e6)
    with contextlib.closing(WorkerRegistry(broker.url, prefix=broker.prefix)) as registry:
        registry.beat(info)
    waits = "next try when a worker is free, after StoreFull: The store is full"
    assert waits in ssvm("jobs")[1]
    assert f"\nwaits      {waits}" in ssvm("job", "again")[1]


def test_retry_and_cancel_many(ledger: Ledger, ssvm: Run) -> None:
    """Several ids, or a filter, change several jobs, and the error of one does not stop the others."""
    put(ledger, "a", "2", FULL)
    put(ledger, "b", "3", FULL)
    put(ledger, "c", "3", MISMATCH)

    assert ssvm("retry", "--error", "StoreFull")[1].split() == ["queued", "again:", "b", "queued", "again:", "a"]
    status, told = ssvm("cancel", "a", "c", "b")
    assert (status, told.count("asked to stop: "), "ended already" in told) == (1, 2, True)
    assert {each.job_id: each.state for each in ledger.page()} == {"a": "queued", "b": "queued", "c": "failed"}
    assert ssvm("retry", "--account", "2")[1].strip() == "no jobs match"


def test_retry_spares_cancelled_jobs(ledger: Ledger, ssvm: Run) -> None:
    """A filter retries failed jobs, and cancelled jobs only if the user names that state."""
    put(ledger, "a", "2")
    assert ssvm("cancel", "--account", "2")[1].strip() == "cancelled: a"

    assert ssvm("retry", "--account", "2")[1].strip() == "no jobs match"
    assert ssvm("retry", "--state", "cancelled")[1].strip() == "queued again: a"


@pytest.mark.parametrize("argv", [["retry"], ["cancel", "a", "--zone", "zone1"], ["jobs", "--since", "yesterday"]])
def test_wrong_choice(ledger: Ledger, ssvm: Run, argv: list[str]) -> None:
    """No id and no filter, both, or an invalid time is wrong usage."""
    assert ssvm(*argv)[0] == 2


def test_top(ledger: Ledger, broker: Broker) -> None:
    """Top shows the running and queued jobs of one zone on a terminal, again and again until Ctrl-C."""
    put(ledger, "runs", "2")
    put(ledger, "elsewhere", "2", zone="zone2")
    environ = {"SSVM_BROKER__URL": broker.url, "SSVM_BROKER__PREFIX": broker.prefix}
    claim = ledger.claim("runs", "worker-1")
    assert claim
    ledger.beat(claim, {"stage": "download", "bytes": 50, "total": 100, "rate": 10})

    terminal = Terminal(sys.executable, "-m", "ssvm_worker", "top", "--interval", "0.1s", environ=environ)
    terminal.wait_for("  50 %  50 B of 100 B  10 B/s  5 s left")
    put(ledger, "waits", "2")
    terminal.wait_for("waits")
    terminal.process.send_signal(signal.SIGINT)

    assert terminal.ended() == 0
    assert "elsewhere" not in terminal.seen


def test_top_for_programs(ledger: Ledger, ssvm: Run) -> None:
    """Without a terminal, top prints one state of the zone."""
    put(ledger, "waits", "2")

    assert [each["job_id"] for each in json.loads(ssvm("top", "--json")[1])["jobs"]] == ["waits"]
    assert "1 queued" in ssvm("top")[1]
