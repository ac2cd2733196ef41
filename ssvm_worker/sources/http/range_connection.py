"""Fetch ranges of one HTTP object over one connection, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ssvm_worker.errors import SourceChanged, SourceDenied, SourceUnavailable
from ssvm_worker.net.http import HttpResponse, HttpSession
from ssvm_worker.streaming.interfaces import CHUNK, Check

from .request import Hop, refusal, translating
from .validators import Validator


@dataclass(frozen=True)
class RangeTarget:
    """The hop that sent the first answer, and the version of the object there."""

    hop: Hop
    validator: Validator
    #: Content-Encoding of the first answer.
    encoding: str = ""


class HttpRangeConnection:
    """``RangeConnection`` over HTTP. It refuses redirects: the target is the end of all redirects already."""

    def __init__(
        self, target: RangeTarget, check: Check, answer: HttpResponse | None = None, position: int = 0
    ) -> None:
        """Use the connection of *answer*, or open one. The unread body starts at *position* and reaches the end."""
        self._target = target
        self._check = check
        self._answer = answer
        self._position = position
        self._is_rest = answer is not None
        self._session = self._new_session()
        if answer is not None:
            answer.adapter.check = check

    def _new_session(self) -> HttpSession:
        return HttpSession(self._target.hop.settings, self._check, keep=True, node=self._target.hop.node)

    @property
    def rest(self) -> int | None:
        """Return the position of the answer that reaches the end of the object, or None without such an answer."""
        return self._position if self._is_rest else None

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from *start* to *end*. Raises SourceUnavailable, SourceDenied or SourceChanged."""
        where = self._target.hop.url.name
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
        if self._is_rest and self._answer is not None:
            self._answer.close()
        self._session.close()

    def _ask(self, start: int, end: int) -> HttpResponse:
        target, where = self._target, self._target.hop.url.name
        if self._is_rest and self._answer is not None:
            self._answer.close()  # its body may have gigabytes, which are not needed any more
            self._is_rest = False
        with translating(where):
            headers = {**target.hop.headers, **target.validator.range(start, end)}
            answer = self._session.exchange("GET", target.hop.url, headers)
        if answer.status_code == 206:
            reason = target.validator.refuse_range(answer, start, end, target.encoding)
            if not reason:
                return answer
        answer.close()
        if answer.status_code not in (200, 206):
            raise refusal(answer, where)
        if answer.status_code == 200 and not (reason := target.validator.refuse_whole(answer, target.encoding)):
            raise SourceDenied("The server sends no ranges on this connection", where, "Set download.connections = 1")
        raise SourceChanged(reason, where, "Submit the job again")
