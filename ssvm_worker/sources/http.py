"""A source behind an http or https URL: checked, counted, and resumed only where it provably is the same object."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing

from ssvm_worker.errors import SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable
from ssvm_worker.stream import CHUNK, Check, limit
from ssvm_worker.sums import decode_text
from ssvm_worker.units import MiB
from ssvm_worker.weburl import check_headers, parse

from .ending import empty, whole
from .exchange import Exchange, HttpSettings, get, refusal, translated
from .rangeline import RangeLine, Wanted
from .several import Pace, Several
from .validator import Validator, strong_date, strong_etag

__all__ = ["HttpSource", "Validator", "fetch_text"]

#: How often several connections are tried, when in the end none of them was left.
_CHANCES = 2


class HttpSource:
    """``stream.Source`` for http and https.

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
        with closing(self._ask(offset)) as answer, translated(self.name):
            skip = self._begin(answer, offset)
            position = offset - skip
            pace = Pace(self._settings.many)
            while chunk := answer.read(CHUNK):
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
        allowed = many.connections > 1 and self._failures < _CHANCES
        return allowed and self.resumable and rest >= many.connections * many.range_size

    def _many(self, answer: Exchange, position: int) -> Generator[bytes, None, None]:
        """The rest by ranges on several connections; the first of them is that of *answer*."""
        assert self.size is not None
        assert self.validator is not None
        wanted = Wanted(answer.url, answer.trusted, self.validator, answer.line.settings)
        answers = [answer]

        def open_line(start: int, check: Check) -> RangeLine:
            return RangeLine(wanted, check, answers.pop() if start == position and answers else None, start)

        try:
            yield from Several(self._settings.many, self._check).fetch(open_line, position, self.size)
        except (SourceDenied, SourceNotFound, SourceUnavailable) as error:
            self._failures += 1
            # The first answer was good: a link to which we were redirected has expired, or there were too many of us.
            raise SourceUnavailable(error.what, error.where, error.remedy) from error

    def _ask(self, offset: int) -> Exchange:
        own: dict[str, str] = {}
        if offset:
            if self.validator is None:
                raise self._changed("The server gives nothing to tell whether the rest is of the same object")
            own = self.validator.range(offset)
        return get(self._url, own, self._headers, self._settings, self._check)

    def _begin(self, answer: Exchange, offset: int) -> int:
        """Judge the head of an answer; returns how many of its bytes to skip."""
        if offset and answer.status == 416:
            raise self._changed(f"The object has no bytes from {offset} on any more")
        if answer.status == 204:
            raise empty(self.name)
        if answer.status not in ((200, 203, 206) if offset else (200, 203)):
            raise refusal(answer.status, answer.url.name)
        if not offset:
            self._remember(answer)
            return 0
        if answer.status == 206 and self.validator:
            self.validator.match_range(answer, offset, None, self.name)
            return 0
        return self._match_whole(answer, offset)

    def _remember(self, answer: Exchange) -> None:
        """Take the size and the validator from the first answer."""
        self.size = _length(answer)
        self.validator = None
        ranges = "bytes" in answer.headers.get("Accept-Ranges", "").lower()
        if self.size and ranges:
            etag = strong_etag(answer)
            date = None if etag else strong_date(answer)
            self.validator = Validator(etag, date, self.size) if etag or date else None

    def _match_whole(self, answer: Exchange, offset: int) -> int:
        """The server gave the whole object: another one, unless it names the same strong ETag and ignores ranges."""
        etag = self.validator.etag if self.validator else None
        if etag and etag == strong_etag(answer) and _length(answer) in (None, self.size):
            return offset
        raise self._changed("The object has changed since its first bytes came")

    def _changed(self, what: str) -> SourceChanged:
        return SourceChanged(what, self.name, "Ask again, to start from the first byte")


def _length(answer: Exchange) -> int | None:
    """Content-Length; None where there is none, or the body is chunked and it does not count."""
    text = answer.headers.get("Content-Length")
    if text is None or "Transfer-Encoding" in answer.headers:
        return None
    values = {each.strip() for each in text.split(",")}
    if len(values) != 1 or not (value := values.pop()).isdecimal():
        raise SourceUnavailable(f"The server gives no clear Content-Length: {text[:80]!r}", answer.url.name)
    return int(value)


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
