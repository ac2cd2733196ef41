"""A connection that gives one range of an http object after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ssvm_worker.errors import SourceChanged, SourceDenied, SourceUnavailable
from ssvm_worker.net.urls import WebUrl
from ssvm_worker.streaming.interfaces import CHUNK, Check

from .request import HttpConnection, HttpResponse, HttpSettings, refusal, translated
from .validators import Validator


@dataclass(frozen=True)
class RangeTarget:
    """The object: where the redirects of its first answer led, and what tells it from any other."""

    url: WebUrl
    #: The caller's, where they may be sent there.
    headers: Mapping[str, str]
    validator: Validator
    settings: HttpSettings
    #: Content-Encoding of the first answer.
    encoding: str = ""
    #: The address that gave the first answer: other nodes behind the name may have other ETags.
    node: str = ""


class HttpRangeConnection:
    """``several.HttpConnection`` over http. A redirect is refused: the first answer came from where they end."""

    def __init__(
        self, wanted: RangeTarget, check: Check, answer: HttpResponse | None = None, position: int = 0
    ) -> None:
        """*answer*: one whose body goes on at *position*, to the end of the object."""
        self._wanted = wanted
        self._answer = answer
        self._position = position
        self._is_rest = answer is not None
        self._line = answer.line if answer else self._new_line(check)
        self._line.check = check

    def _new_line(self, check: Check) -> HttpConnection:
        return HttpConnection(self._wanted.url, self._wanted.settings, check, keep=True, node=self._wanted.node)

    @property
    def rest(self) -> int | None:
        """Where the answer goes on that reaches to the end of the object; None if it has been given up."""
        return self._position if self._is_rest else None

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from *start* to *end*; SourceUnavailable, SourceDenied, SourceChanged."""
        where = self._wanted.url.name
        if not self._is_rest or self._position != start or self._answer is None:
            self._answer, self._position = self._ask(start, end), start
        with translated(where):
            while self._position < end:
                chunk = self._answer.read(min(CHUNK, end - self._position))
                if not chunk:
                    raise SourceUnavailable(
                        f"The range ended at {self._position} of {end}", where, "Look at the server"
                    )
                self._position += len(chunk)
                yield chunk

    def close(self) -> None:
        """Close the connection."""
        self._line.close()

    def _ask(self, start: int, end: int) -> HttpResponse:
        wanted, where = self._wanted, self._wanted.url.name
        if self._is_rest:  # which may be gigabytes, and nobody wants it
            self._line.close()
            self._line = self._new_line(self._line.check)
            self._is_rest = False
        answer = self._line.get({**wanted.headers, **wanted.validator.range(start, end)})
        if answer.status == 206:
            reason = wanted.validator.refuse_range(answer, start, end, wanted.encoding)
            if not reason:
                return answer
        answer.close()
        if answer.status not in (200, 206):
            raise refusal(answer, where)
        if answer.status == 200 and not (reason := wanted.validator.refuse_whole(answer, wanted.encoding)):
            raise SourceDenied("The server gives no ranges on this connection", where, "Set download.connections = 1")
        raise SourceChanged(reason, where, "Ask again")
