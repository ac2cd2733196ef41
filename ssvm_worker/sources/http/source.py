"""A source behind an http or https URL: checked, counted, and resumed only where it provably is the same object."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace

from ssvm_worker.artifacts.checksum_files import decode_text
from ssvm_worker.errors import SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable
from ssvm_worker.net.sockets import Stalled
from ssvm_worker.net.urls import check_headers, parse
from ssvm_worker.sources.ending import empty, whole
from ssvm_worker.streaming.interfaces import CHUNK, Check
from ssvm_worker.streaming.pipeline import limit
from ssvm_worker.units import MiB

from .parallel import ConnectionSpeed, ParallelDownload
from .range_connection import HttpRangeConnection, RangeTarget
from .request import HttpResponse, HttpSettings, get, refusal, translated
from .validators import Validator, content_coding, content_range, strong_date, strong_etag

__all__ = ["HttpSource", "Validator", "fetch_text"]

#: How often each of these is tried in a row: several connections, of which none is left in the end; the place that gave
#: the first bytes, before a redirector may choose another one; a range that gives nothing, before a plain GET.
_CHANCES = 2


class HttpSource:
    """A ``Source`` for http and https.

    Bytes are given as they are sent: where a server labels them with a Content-Encoding though we ask for none, it is
    the encoded bytes that are counted, hashed and stored. Holds one chunk at a time.
    """

    def __init__(
        self,
        url: str,
        settings: HttpSettings,
        *,
        headers: Mapping[str, str] | None = None,
        check: Check = lambda: None,
        validator: Validator | None = None,
    ) -> None:
        """*validator*: that of an earlier attempt, so that the first ``open`` may start behind its bytes.

        Raises InvalidRequest for a URL or header that is never sent; touches nothing.
        """
        self._url = parse(url)
        self._headers = check_headers(headers or {})
        self._settings = settings
        self._check = check
        self.name = self._url.name
        self.validator = validator
        self.size = validator.size if validator else None
        #: How often all of several connections have failed.
        self._failures = 0
        #: How often in a row the place that gave the first bytes gave none of the rest.
        self._misses = 0
        #: How often in a row a request for a range gave not a byte.
        self._idle = 0
        #: The object at that place; None in a later attempt, and where nothing tells it from another one.
        self._wanted: RangeTarget | None = None
        #: Whether its ranges may be used: a server may promise what it does not keep.
        self._has_ranges = True

    @property
    def resumable(self) -> bool:
        """Whether the server takes ranges and gave what proves that they are of the same object."""
        return self.validator is not None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on; the request is made when the first is asked for.

        Raises SourceNotFound (also for an empty object), SourceDenied, SourceChanged, SourceUnavailable.
        """
        if offset and offset == self.size:
            return
        answer, skip = self._ask(offset)
        with closing(answer), translated(self.name):
            position = offset - skip
            pace = ConnectionSpeed(self._settings.many)
            while chunk := answer.read(CHUNK):
                self._misses = self._idle = 0
                position += len(chunk)
                pace.judge(len(chunk), answer.starved)
                if skip < len(chunk):
                    yield chunk[skip:] if skip else chunk
                skip = max(0, skip - len(chunk))
                if not skip and pace.slow and self._is_worth_many(position):
                    yield from self._many(answer, position)
                    return
        self.size = whole(position, self.size, self.name)

    def _is_worth_many(self, position: int) -> bool:
        many = self._settings.many
        rest = (self.size or 0) - position
        allowed = many.connections > 1 and self._failures < _CHANCES and self._has_ranges
        return allowed and self._wanted is not None and rest >= many.connections * many.range_size

    def _many(self, answer: HttpResponse, position: int) -> Generator[bytes, None, None]:
        """Yield the rest by ranges on several connections; the first of them is that of *answer*."""
        assert self.size is not None
        assert self._wanted is not None
        wanted, answers = self._wanted, [answer]

        def open_line(start: int, check: Check) -> HttpRangeConnection:
            return HttpRangeConnection(wanted, check, answers.pop() if start == position and answers else None, start)

        try:
            yield from ParallelDownload(self._settings.many, self._check).fetch(open_line, position, self.size)
        except (SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable) as error:
            self._failures += 1
            # The first answer was good: a link to which we were redirected has expired, there were too many of us, or
            # other nodes have other ETags. One connection may go on.
            raise SourceUnavailable(error.what, error.where, error.remedy) from error

    def _ask(self, offset: int) -> tuple[HttpResponse, int]:
        """Return an answer, and how many of its bytes to skip.

        The rest is asked of the place that gave the first bytes, and then of the caller's URL: a redirector may choose
        another mirror, whose copy has another ETag.
        """
        if not offset:
            return self._ask_first(), 0
        if self.validator is None:
            raise self._changed("The server gives nothing to tell whether the rest is of the same object")
        known = self._wanted or RangeTarget(self._url, {}, self.validator, self._settings)
        if known.url != self._url:
            try:
                return self._ask_rest(known, offset)
            except SourceUnavailable:
                self._misses += 1
                if self._misses < _CHANCES:
                    raise
            except (SourceChanged, SourceDenied, SourceNotFound):
                pass
        origin = replace(known, url=self._url, headers=self._headers, settings=self._settings)
        return self._ask_rest(origin, offset)

    def _ask_first(self) -> HttpResponse:
        answer = get(self._url, {}, self._headers, self._settings, self._check)
        try:
            self._remember(answer)
        except BaseException:
            answer.close()
            raise
        return answer

    def _ask_rest(self, wanted: RangeTarget, offset: int) -> tuple[HttpResponse, int]:
        """Ask by a range; where the server has none that can be used, for the whole, whose first bytes are skipped."""
        validator = wanted.validator
        ranges = self._has_ranges and self._idle < _CHANCES
        for own in ([validator.range(offset)] if ranges else []) + [{}]:
            try:
                answer = get(wanted.url, own, wanted.headers, wanted.settings, self._check, node=wanted.node)
            except SourceUnavailable as error:
                # Whoever took the request and gave nothing may do so with each range.
                self._idle += bool(own) and isinstance(error.__cause__, ConnectionResetError | Stalled)
                raise
            is_whole = answer.status in (200, 203)
            if is_whole:
                reason = validator.refuse_whole(answer, wanted.encoding)
            elif own and answer.status == 206:
                reason = validator.refuse_range(answer, offset, None, wanted.encoding)
            else:
                reason = f"status {answer.status}"
            if not reason:
                self._has_ranges = bool(own)
                self._idle += answer.status == 206
                line = answer.line
                self._wanted = replace(
                    wanted, url=answer.url, headers=answer.trusted, settings=line.settings, node=line.node
                )
                return answer, offset if is_whole else 0
            answer.close()
            if is_whole:
                raise self._changed(reason)
            if answer.status == 429:  # it wants fewer requests, not another one
                break
        raise refusal(answer)

    def _remember(self, answer: HttpResponse) -> None:
        """Judge the head of the first answer; take the size and the validator from it."""
        if answer.status in (204, 205):
            raise empty(self.name)
        span = content_range(answer) if answer.status == 206 else None
        if answer.status == 206 and (span is None or span[:2] != (0, span[2])):
            what = "The server gives a part of the file (status 206), though all of it was asked for"
            raise SourceUnavailable(what, answer.url.name, "Look at the server, and at caches before it")
        if answer.status not in (200, 203, 206):
            raise refusal(answer)
        self.size = answer.length if span is None else span[2]
        self.validator = self._wanted = None
        ranges = "bytes" in answer.headers.get("Accept-Ranges", "").lower()
        if not self.size or not ranges:
            return
        etag = strong_etag(answer)
        date = None if etag else strong_date(answer)
        if etag or date:
            self.validator = validator = Validator(etag, date, self.size)
            place = (answer.url, answer.trusted, validator, answer.line.settings)
            self._wanted = RangeTarget(*place, encoding=content_coding(answer), node=answer.line.node)

    def _changed(self, what: str) -> SourceChanged:
        return SourceChanged(what, self.name, "Ask again, to start from the first byte")


def fetch_text(
    url: str,
    settings: HttpSettings,
    *,
    headers: Mapping[str, str] | None = None,
    check: Check = lambda: None,
    most: int = MiB,
) -> str:
    """A small text, such as a SHA256SUMS file, by the same rules; TooLarge above *most* bytes."""
    source = HttpSource(url, settings, headers=headers, check=check)
    return decode_text(b"".join(limit(source.open(), most, source.name)))
