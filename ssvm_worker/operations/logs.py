"""Log lines as text, JSON or key=value, with the id of the job, to standard error and optionally to syslog.

A pool process, and ``ssvm run``, work on one job at a time. So all lines of their threads and libraries belong to that
job. A process with several jobs names the job of a line by ``about``.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import SYSLOG_UDP_PORT, SysLogHandler
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ssvm_worker.config.schema import LogSection
from ssvm_worker.errors import ConfigError
from ssvm_worker.units import printable

#: The id of a job, and the number of the attempt.
_Subject = tuple[str, int]
_NONE: _Subject = ("", 0)
_of_context: ContextVar[_Subject] = ContextVar("subject")
_of_process: list[_Subject] = [_NONE]
_LOG = logging.getLogger("ssvm.logs")
#: The program's name in syslog.
_IDENT = "ssvm: "
#: Seconds that a line may wait for a syslog daemon that does not read. Without a limit a job would hang.
_SYSLOG_S = 0.5


@contextmanager
def about(job_id: str) -> Iterator[None]:
    """Add the job to the log lines of this thread while the block runs."""
    token = _of_context.set((job_id, 0))
    try:
        yield
    finally:
        _of_context.reset(token)


@contextmanager
def working(job_id: str) -> Iterator[None]:
    """Add the job to the log lines of this process while the block runs."""
    begin(job_id)
    try:
        yield
    finally:
        end()


def begin(job_id: str, attempt: int = 0) -> None:
    """Add the job to the log lines of this process until ``end``."""
    _of_process[0] = (job_id, attempt)


def end() -> None:
    """Stop adding a job to the log lines of this process. Safe to repeat."""
    _of_process[0] = _NONE


def start(settings: LogSection, level: str | None = None, stream: IO[str] | None = None) -> None:
    """Configure the log of this process and of those that it forks. *level* is only for standard error.

    Libraries log nothing below INFO, because their lines about requests contain signed URLs there. Raise ConfigError
    for a syslog host without an address.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(stream or sys.stderr)]
    handlers[0].setLevel((level or settings.level).upper())
    if settings.syslog:
        handlers.append(_syslog(settings.syslog))
        handlers[-1].setLevel(settings.level.upper())
    for each in handlers:
        each.setFormatter(FORMATS[settings.format]())
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    url = urlsplit(settings.syslog or "")
    if url.scheme == "unix" and not Path(url.path).is_socket():  # a UDP host cannot be checked
        _LOG.warning("log.syslog %s does not exist; until then, lines appear only here", settings.syslog)


class Text(logging.Formatter):
    """The format for people: time, level, process, logger, [job/attempt], message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(processName)s %(name)s%(about)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        job_id, attempt = _subject(record)
        record.about = f" [{job_id}{f'/{attempt}' if attempt else ''}]" if job_id else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return one line. The text of a server may contain line breaks, followed by a forged line."""
        return printable(super().formatMessage(record).rstrip())  # some of Celery's lines end in line breaks

    def formatException(self, ei: Any) -> str:
        """Indent the traceback, so that a line of an error's text does not look like a line of the log."""
        return textwrap.indent(printable(super().formatException(ei), keep="\n"), "  ")


class Json(logging.Formatter):
    """The format for machines: a JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(json.dumps(_fields(record, self), ensure_ascii=False, default=str))


class KeyValue(logging.Formatter):
    """The format for both: ``key=value``. A value with blanks, quotes or line breaks is quoted as in JSON."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_quoted(str(value))}" for name, value in _fields(record, self).items())


FORMATS: dict[str, type[Text | Json | KeyValue]] = {"text": Text, "json": Json, "keyvalue": KeyValue}


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    job_id, attempt = _subject(record)
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    found: dict[str, Any] = {
        "time": when.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "job_id": job_id,
        "attempt": attempt,
        "process": record.processName,
        "thread": record.threadName,
        "message": record.getMessage().rstrip(),
    }
    if record.exc_info:
        found["exception"] = formatter.formatException(record.exc_info)
    return {name: value for name, value in found.items() if value}


def _subject(record: logging.LogRecord) -> _Subject:
    """Return the job of the line itself, else of its thread, else of its process."""
    if job_id := getattr(record, "job_id", ""):
        return job_id, _of_process[0][1] if _of_process[0][0] == job_id else 0
    return _of_context.get(_of_process[0])


def _quoted(text: str) -> str:
    plain = text and text.isprintable() and not any(each in text for each in ' "=')
    return text if plain else printable(json.dumps(text, ensure_ascii=False))


class _Syslog(SysLogHandler):
    """A handler that drops lines if the daemon is away or hangs, without an error for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore the error, because standard error has the line."""

    def _connect_unixsocket(self, address: str) -> None:
        super()._connect_unixsocket(address)  # type: ignore[misc]  # called again after a restart of the daemon
        vars(self)["socket"].settimeout(_SYSLOG_S)


def _syslog(url: str) -> logging.Handler:
    parts = urlsplit(url)
    address = parts.path if parts.scheme == "unix" else (parts.hostname or "localhost", parts.port or SYSLOG_UDP_PORT)
    try:
        handler = _Syslog(address, facility=SysLogHandler.LOG_DAEMON)
    except OSError as error:
        what = f"Cannot connect to syslog: {error.strerror or error}"
        raise ConfigError(what, f"log.syslog {url}", "Name the host of a syslog daemon, or its socket") from error
    handler.ident, handler.append_nul = _IDENT, False
    return handler
