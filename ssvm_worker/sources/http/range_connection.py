"""Fetch ranges of one HTTP object over one connection, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ssvm_worker.errors import SourceChanged, SourceDenied, SourceUnavailable
from ssvm_worker.net.urls import WebUrl
from ssvm_worker.streaming.interfaces import CHUNK, Check

from .request import HttpConnection, HttpResponse, HttpSettings, refusal, translating
from .validators import Validator


@dataclass(frozen=True)
class RangeTarget:
    """Final URL of the first answer, and the version of the object there."""

    url: WebUrl
    #: The caller's headers, unless they must not be sent to this URL.
    headers: Mapping[str, str]
    validator: Validator
    settings: HttpSettings
    #: Content-Encoding of the first answer.
    encoding: str = ""
    #: The address that sent the first answer. Other nodes behind the name may have other ETags.
    node: str = ""


class HttpRangeConnection:
    """``RangeConnection`` over HTTP. It refuses redirects: the target is the end of all redirects already."""

    def __init__(
        self, target: RangeTarget, check: Check, answer: HttpResponse | None = None, position: int = 0
    ) -> None:
        """Use the connection of *answer*, or open one. The unread body starts at *position* and reaches the end."""
        self._target = target
        self._answer = answer
        self._position = position
        self._is_rest = answer is not None
        self._connection = answer.connection if answer else self._new_connection(check)
        self._connection.check = check

    def _new_connection(self, check: Check) -> HttpConnection:
        return HttpConnection(self._target.url, self._target.settings, check, keep=True, node=self._target.node)

    @property
    def rest(self) -> int | None:
        """Return the position of the answer that reaches the end of the object, or None without such an answer."""
        return self._position if self._is_rest else None

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from *start* to *end*. Raises SourceUnavailable, SourceDenied or SourceChanged."""
        where = self._target.url.name
        if not self._is_rest or self._position != start or self._answer is None:
            self._answer, self._position = self._ask(start, end), start
        with translating(where):
            while self._position < end:
                chunk = self._answer.read(min(CHUNK, end - self._position))
                if not chunk:
                    raise SourceUnavailable(f"The range ended at {self._position} of {end}", where, "Check the server")
                self._position += len(chunk)
                yield chunk

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _ask(self, start: int, end: int) -> HttpResponse:
        target, where = self._target, self._target.url.name
        if self._is_rest:  # its body may have gigabytes, which are not needed any more
            self._connection.close()
            self._connection = self._new_connection(self._connection.check)
            self._is_rest = False
        answer = self._connection.get({**target.headers, **target.validator.range(start, end)})
        if answer.status == 206:
            reason = target.validator.refuse_range(answer, start, end, target.encoding)
            if not reason:
                return answer
        answer.close()
        if answer.status not in (200, 206):
            raise refusal(answer, where)
        if answer.status == 200 and not (reason := target.validator.refuse_whole(answer, target.encoding)):
            raise SourceDenied("The server sends no ranges on this connection", where, "Set download.connections = 1")
        raise SourceChanged(reason, where, "Submit the job again")
