"""Lines of the log: text, JSON or key=value, each with its job's id; to standard error, and to syslog if one is named.

A process of the worker's pool runs one job at a time, and so does ``ssvm run``: what any of its threads says meanwhile,
those of libraries included, is about that job. A process that deals with many says which by ``about``.
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

#: Job and number of the attempt.
_Subject = tuple[str, int]
_NONE: _Subject = ("", 0)
_here: ContextVar[_Subject] = ContextVar("subject")
_of_process: list[_Subject] = [_NONE]
_LOG = logging.getLogger("ssvm.logs")
#: What syslog shows as the program's name.
_IDENT = "ssvm: "
#: Seconds that a line may wait for a daemon that does not read; without, a job would wait for ever.
_SYSLOG_S = 0.5


@contextmanager
def about(job_id: str) -> Iterator[None]:
    """What this thread logs within is about that job."""
    token = _here.set((job_id, 0))
    try:
        yield
    finally:
        _here.reset(token)


@contextmanager
def working(job_id: str) -> Iterator[None]:
    """What this process logs within is about that job."""
    begin(job_id)
    try:
        yield
    finally:
        end()


def begin(job_id: str, attempt: int = 0) -> None:
    """From now on this process is about that job, until ``end``."""
    _of_process[0] = (job_id, attempt)


def end() -> None:
    """This process is about no job any more. Safe to repeat."""
    _of_process[0] = _NONE


def start(settings: LogSection, level: str | None = None, stream: IO[str] | None = None) -> None:
    """Log as the settings say, from now on, in this process and those that it forks; *level* is standard error's own.

    Raises ConfigError for a syslog host that has no address. Libraries have nothing to say below INFO: what they tell
    of requests there has signed URLs in it.
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
    if settings.syslog and not _is_there(settings.syslog):
        _LOG.warning("log.syslog %s is not there; until it is, lines come here alone", settings.syslog)


class Text(logging.Formatter):
    """For people: time, level, process, who says it, [job/attempt], what."""

    def format(self, record: logging.LogRecord) -> str:
        job_id, attempt = _subject(record)
        record.about = f" [{job_id}{f'/{attempt}' if attempt else ''}]" if job_id else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line: a server's words may hold line breaks, and a forged line behind one."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Indented, so that no line of an error's text passes for a line of the log."""
        return textwrap.indent(printable(super().formatException(ei), keep="\n"), "  ")

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(processName)s %(name)s%(about)s %(message)s")


class Json(logging.Formatter):
    """For machines: one object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(json.dumps(_fields(record, self), ensure_ascii=False, default=str))


class KeyValue(logging.Formatter):
    """For both: ``key=value``, quoted as JSON is where a value has blanks, quotes or line ends."""

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
        "message": record.getMessage(),
    }
    if record.exc_info:
        found["exception"] = formatter.formatException(record.exc_info)
    return {name: value for name, value in found.items() if value}


def _subject(record: logging.LogRecord) -> _Subject:
    """What the line itself says, else its thread, else its process."""
    if job_id := getattr(record, "job_id", ""):
        return job_id, _of_process[0][1] if _of_process[0][0] == job_id else 0
    return _here.get(_of_process[0])


def _quoted(text: str) -> str:
    plain = text and text.isprintable() and not any(each in text for each in ' "=')
    return text if plain else printable(json.dumps(text, ensure_ascii=False))


class _Syslog(SysLogHandler):
    """One that is away or hangs costs lines and a moment, and not a word on standard error for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """The line stands on standard error anyway."""

    def _connect_unixsocket(self, address: str) -> None:
        super()._connect_unixsocket(address)  # type: ignore[misc]  # it connects anew when the daemon was restarted
        vars(self)["socket"].settimeout(_SYSLOG_S)


def _is_there(url: str) -> bool:
    """What a UDP host does nobody knows."""
    parts = urlsplit(url)
    return parts.scheme != "unix" or Path(parts.path).is_socket()


def _syslog(url: str) -> logging.Handler:
    parts = urlsplit(url)
    where = parts.path if parts.scheme == "unix" else (parts.hostname or "localhost", parts.port or SYSLOG_UDP_PORT)
    try:
        handler = _Syslog(where, facility=SysLogHandler.LOG_DAEMON)
    except OSError as error:
        what = f"Nothing takes log lines there: {error.strerror or error}"
        raise ConfigError(what, f"log.syslog {url}", "Name the host of a syslog daemon, or its socket") from error
    handler.ident, handler.append_nul = _IDENT, False
    return handler
