"""Each log line names its job, in every form, from any thread, and in syslog."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssvm_worker.config.schema import LogSection
from ssvm_worker.errors import ConfigError
from ssvm_worker.operations import logs
from tests.servers.syslog import Syslog
from tests.servers.worker import until

LOGGER = logging.getLogger("ssvm.test")


@contextmanager
def logged(**given: object) -> Iterator[io.StringIO]:
    """Return the output of these settings to standard error."""
    root, text = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    root.handlers.clear()  # pytest's own, which must not be closed
    try:
        logs.start(LogSection.model_validate(given), stream=text)
        yield text
    finally:
        for each in root.handlers:
            each.close()
        root.handlers[:] = before
        root.setLevel(level)
        logging.captureWarnings(False)
        logs.end()


def say() -> None:
    """Log one line."""
    LOGGER.info('said "%s"', "it")


def test_json() -> None:
    """A line is one JSON object for any message."""
    with logged(format="json") as text, logs.about("j1"):
        LOGGER.warning("two\nlines, \x1b and ä")
    found = json.loads(text.getvalue())
    assert (found["job_id"], found["level"], found["logger"]) == ("j1", "warning", "ssvm.test")
    assert found["message"] == "two\nlines, \x1b and ä"
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("form", ["text", "json", "keyvalue"])
def test_line_breaks_at_the_end(form: str) -> None:
    """The line breaks at the end of some of Celery's messages are not shown."""
    with logged(format=form) as text:
        LOGGER.warning("received task\n\n")
    assert "received task" in text.getvalue()
    assert "\\" not in text.getvalue()


def test_keyvalue() -> None:
    """A line is key=value, and values with blanks, quotes or line breaks are quoted."""
    with logged(format="keyvalue") as text, logs.about("j1"):
        LOGGER.info('"%s"\nis said', "it")
    [line] = text.getvalue().splitlines()
    assert " level=info logger=ssvm.test job_id=j1 " in line
    assert line.endswith(r'message="\"it\"\nis said"')


@pytest.mark.parametrize("form", ["json", "keyvalue"])
def test_a_traceback_stays_in_its_line(form: str) -> None:
    """A traceback starts no new line, because that line would name no job."""
    with logged(format=form) as text, logs.about("j1"):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            LOGGER.exception("it failed")
    assert text.getvalue().count("\n") == 1
    assert "Traceback" in text.getvalue()


@pytest.mark.parametrize("form", ["text", "json", "keyvalue"])
def test_every_thread_of_a_process(form: str) -> None:
    """While a process runs a job, the lines of its threads name the job and the attempt."""
    with logged(format=form) as text:
        logs.begin("j1", attempt=2)
        thread = threading.Thread(target=say)
        thread.start()
        thread.join()
        during = text.getvalue()
        logs.end()
        say()
    shown = {"text": "[j1/2]", "json": '"job_id": "j1", "attempt": 2', "keyvalue": "job_id=j1 attempt=2"}
    assert shown[form] in during
    assert "j1" not in text.getvalue().removeprefix(during)


def test_threads_of_many_jobs() -> None:
    """A thread that works for another job names that job, and other threads' lines are unchanged."""
    with logged(format="json") as text:

        def other() -> None:
            with logs.about("j2"):
                say()

        with logs.about("j1"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            say()
        say()
    found = [json.loads(line).get("job_id") for line in text.getvalue().splitlines()]
    assert found == ["j2", "j1", None]


def test_libraries_do_not_tell_requests() -> None:
    """Below INFO, libraries log URLs with signatures, so nothing below INFO is logged."""
    with logged() as text:
        logging.getLogger("urllib3.connectionpool").debug("GET /x?X-Amz-Signature=secret")
    assert text.getvalue() == ""


@pytest.mark.parametrize("kind", ["udp", "unix"])
def test_syslog(kind: str) -> None:
    """Syslog receives the same lines with their severity, from the configured level."""
    with tempfile.TemporaryDirectory(prefix="ssvm-") as directory:
        syslog = Syslog(Path(directory) / "log" if kind == "unix" else None)
        with logged(format="json", syslog=syslog.url) as text, logs.about("j1"):
            say()
            LOGGER.error("bad")
            until(lambda: len(syslog.lines) == 2, "both lines have come")
        syslog.close()
    assert [severity for severity, _ in syslog.lines] == [6, 3]
    assert [line for _, line in syslog.lines] == text.getvalue().splitlines()


def test_syslog_that_goes_away(capfd: pytest.CaptureFixture[str]) -> None:
    """If a syslog daemon ends or blocks, only its lines are lost, and later lines reach it again."""
    with tempfile.TemporaryDirectory(prefix="ssvm-") as directory:
        path = Path(directory) / "log"
        first = Syslog(path)
        with logged(syslog=first.url) as text:
            say()
            first.close()
            path.unlink()
            say()
            second = Syslog(path)
            say()
            until(lambda: len(second.lines) == 1, "the next line has come")
            second.close()
    assert len(text.getvalue().splitlines()) == 3
    assert "Traceback" not in capfd.readouterr().err


def test_no_syslog() -> None:
    """A missing socket is logged once, and a host without an address is an error of the settings."""
    with logged(syslog="unix:///nowhere") as text:
        say()
        say()
    assert text.getvalue().count("log.syslog unix:///nowhere") == 1
    assert len(text.getvalue().splitlines()) == 3
    with pytest.raises(ConfigError, match=r"log.syslog udp://no.such.invalid"), logged(syslog="udp://no.such.invalid"):
        pass
