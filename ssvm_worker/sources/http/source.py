"""Read an http or https URL, and follow its redirects. Resume only if the server proves that the object is the same."""

from __future__ import annotations

import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException

from ssvm_worker.artifacts.checksum_files import decode_text
from ssvm_worker.errors import SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable, WorkerError
from ssvm_worker.net.http import HttpResponse, HttpSession, wait_wanted
from ssvm_worker.net.sockets import AddressRefused, Stalled
from ssvm_worker.net.urls import WebUrl, check_headers, parse
from ssvm_worker.sources.options import HttpSettings, empty_file, require_complete_body
from ssvm_worker.streaming.interfaces import CHUNK, Check
from ssvm_worker.streaming.pipeline import limit
from ssvm_worker.units import MiB

from .parallel import ConnectionSpeed, ParallelDownload
from .validators import Validator, content_coding, content_range, strong_date, strong_etag

__all__ = ["HttpSource", "Validator", "fetch_text"]

#: How often in a row each of these may fail before the source does something else:
#: - all of the parallel connections, before it uses one connection only,
#: - the server of the first bytes, before a redirector may choose another server,
#: - a range request that yields no bytes, before it sends a plain GET.
_MAX_FAILURES = 2
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Hop:
    """A URL with what may be sent to its origin."""

    url: WebUrl
    #: The caller's headers, unless they must not be sent to this URL.
    headers: Mapping[str, str]
    settings: HttpSettings
    #: The address to connect to first: other nodes behind the name may have other ETags.
    node: str = ""

    def next(self, url: WebUrl) -> Hop:
        """Return the target of a redirect. Headers may hold credentials, so another origin gets none of them."""
        if url.origin == self.url.origin:
            return replace(self, url=url)
        return Hop(url, {}, self.settings.without_client_certificate(), self.node)


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
        self._session = HttpSession(target.hop.settings, check, keep=True, node=target.hop.node)
        if answer is not None:
            answer.adapter.check = check

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
            raise refusal(answer, target.hop.headers, where)
        if answer.status_code == 200 and not (reason := target.validator.refuse_whole(answer, target.encoding)):
            raise SourceDenied("The server sends no ranges on this connection", where, "Set download.connections = 1")
        raise SourceChanged(reason, where, "Submit the job again")


class HttpSource:
    """``Source`` for http and https.

    The source yields the bytes as the server sends them. Some servers set a Content-Encoding though the request asks
    for none: then the encoded bytes are counted, hashed and stored. Memory: one chunk.
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
        """Check the URL and the headers without connecting.

        *validator* is the one of an earlier attempt. With it, the first ``open`` may have an offset.
        Raises InvalidRequest for an invalid URL or header.
        """
        self._origin = Hop(parse(url), check_headers(headers or {}), settings)
        self._parallel = settings.parallel
        self._chunk_size = settings.chunk_size
        self._check = check
        self.name = self._origin.url.name
        self.validator = validator
        self.size = validator.size if validator else None
        #: Failures of the parallel connections.
        self._parallel_failures = 0
        #: Failures in a row of the server that sent the first bytes.
        self._server_failures = 0
        #: Range requests in a row that yielded no bytes.
        self._empty_ranges = 0
        #: The object on the server of the first bytes. None in a later attempt, and without a validator.
        self._target: RangeTarget | None = None
        #: Whether range requests may be used: a server may announce ranges that do not work.
        self._has_ranges = True

    @property
    def resumable(self) -> bool:
        """Return whether the server supports ranges and identified the version of the object."""
        return self.validator is not None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on. The request is sent when the first chunk is read.

        Raises SourceNotFound (also for an empty object), SourceDenied, SourceChanged, SourceUnavailable.
        """
        if offset and offset == self.size:
            return
        answer, skip = self._ask(offset)
        with closing(answer), translating(self.name):
            position = offset - skip
            speed = ConnectionSpeed(self._parallel)
            while chunk := answer.read(self._chunk_size):
                self._server_failures = self._empty_ranges = 0
                position += len(chunk)
                speed.add(len(chunk), answer.starved)
                if skip < len(chunk):
                    yield chunk[skip:] if skip else chunk
                skip = max(0, skip - len(chunk))
                if not skip and speed.slow and self._is_worth_more_connections(position):
                    yield from self._read_parallel(answer, position)
                    return
        self.size = require_complete_body(position, self.size, self.name)

    def _is_worth_more_connections(self, position: int) -> bool:
        policy = self._parallel
        rest = (self.size or 0) - position
        allowed = policy.connections > 1 and self._parallel_failures < _MAX_FAILURES and self._has_ranges
        return allowed and self._target is not None and rest >= policy.connections * policy.range_size

    def _read_parallel(self, answer: HttpResponse, position: int) -> Generator[bytes, None, None]:
        """Yield the rest by ranges on several connections. The first connection is the one of *answer*."""
        assert self.size is not None
        assert self._target is not None
        target, answers = self._target, [answer]

        def connect(start: int, check: Check) -> HttpRangeConnection:
            return HttpRangeConnection(target, check, answers.pop() if start == position and answers else None, start)

        try:
            yield from ParallelDownload(self._parallel, self._check).fetch(connect, position, self.size)
        except (SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable) as error:
            self._parallel_failures += 1
            # The first answer was good. Later ones fail for these reasons: the link of a redirect has expired, the
            # server limits the connections, or other nodes have other ETags. So the caller resumes with one connection.
            raise SourceUnavailable(error.what, error.where, error.remedy) from error

    def _ask(self, offset: int) -> tuple[HttpResponse, int]:
        """Return an answer, and how many of its bytes to skip.

        The rest is requested from the server of the first bytes, and then from the caller's URL: a redirector may
        choose another mirror, whose copy has another ETag.
        """
        if not offset:
            return self._ask_first(), 0
        if self.validator is None:
            raise self._changed("The server sent nothing that identifies the version of the object")
        target = self._target or RangeTarget(self._origin, self.validator)
        if target.hop.url != self._origin.url:
            try:
                return self._ask_rest(target, offset)
            except SourceUnavailable:
                self._server_failures += 1
                if self._server_failures < _MAX_FAILURES:
                    raise
            except (SourceChanged, SourceDenied, SourceNotFound):
                pass
        return self._ask_rest(replace(target, hop=replace(self._origin, node=target.hop.node)), offset)

    def _ask_first(self) -> HttpResponse:
        answer, hop = get(self._origin, {}, self._check)
        try:
            self._check_first(answer, hop)
        except BaseException:
            answer.close()
            raise
        return answer

    def _ask_rest(self, target: RangeTarget, offset: int) -> tuple[HttpResponse, int]:
        """Request a range. If ranges do not work, request the whole object, whose first bytes are skipped."""
        validator = target.validator
        use_ranges = self._has_ranges and self._empty_ranges < _MAX_FAILURES
        for range_headers in ([validator.range(offset)] if use_ranges else []) + [{}]:
            try:
                answer, hop = get(target.hop, range_headers, self._check)
            except SourceUnavailable as error:
                # A server that accepts the request and sends nothing may do the same for each range.
                self._empty_ranges += bool(range_headers) and isinstance(
                    error.__cause__, ConnectionResetError | Stalled
                )
                raise
            status = answer.status_code
            is_whole = status in (200, 203)
            if is_whole:
                reason = validator.refuse_whole(answer, target.encoding)
            elif range_headers and status == 206:
                reason = validator.refuse_range(answer, offset, None, target.encoding)
            else:
                reason = f"status {status}"
            if not reason:
                self._has_ranges = bool(range_headers)
                self._empty_ranges += status == 206
                self._target = replace(target, hop=hop)
                return answer, offset if is_whole else 0
            answer.close()
            if is_whole:
                raise self._changed(reason)
            if status == 429:  # the server wants fewer requests, so do not send another one
                break
        raise refusal(answer, hop.headers)

    def _check_first(self, answer: HttpResponse, hop: Hop) -> None:
        """Check the head of the first answer. Take the size and the validator from it."""
        status = answer.status_code
        if status in (204, 205):
            raise empty_file(self.name)
        span = content_range(answer) if status == 206 else None
        if status == 206 and (span is None or span[:2] != (0, span[2])):
            what = "The server sent only a part of the file (status 206), though the whole file was requested"
            raise SourceUnavailable(what, hop.url.name, "Check the server, and the caches in front of it")
        if status not in (200, 203, 206):
            raise refusal(answer, hop.headers)
        self.size = answer.length if span is None else span[2]
        self.validator = self._target = None
        ranges = "bytes" in answer.headers.get("Accept-Ranges", "").lower()
        if not self.size or not ranges:
            return
        etag = strong_etag(answer)
        date = None if etag else strong_date(answer)
        if etag or date:
            self.validator = validator = Validator(etag, date, self.size)
            self._target = RangeTarget(hop, validator, content_coding(answer))

    def _changed(self, what: str) -> SourceChanged:
        return SourceChanged(what, self.name, "Submit the job again, to start from the first byte")


def fetch_text(
    url: str,
    settings: HttpSettings,
    *,
    headers: Mapping[str, str] | None = None,
    check: Check = lambda: None,
    max_bytes: int = MiB,
) -> str:
    """Return a small text, for example a SHA256SUMS file. Raises TooLarge above *max_bytes*."""
    source = HttpSource(url, settings, headers=headers, check=check)
    return decode_text(b"".join(limit(source.open(), max_bytes, source.name)))


def get(hop: Hop, range_headers: Mapping[str, str], check: Check) -> tuple[HttpResponse, Hop]:
    """Send a GET and follow redirects. Return the first answer that is not a redirect, and the hop that sent it.

    *range_headers* are sent to every hop.
    Raises SourceDenied for a forbidden hop, a loop, or too many redirects. Raises SourceUnavailable.
    """
    urls = [hop.url]
    while True:
        with translating(hop.url.name):
            session = HttpSession(hop.settings, check, node=hop.node)
            answer = session.exchange("GET", hop.url, {**hop.headers, **range_headers})
        location = answer.headers.get("Location")
        if answer.status_code not in _REDIRECTS or not location:
            return answer, replace(hop, node=session.adapter.node)
        answer.close()
        hop = hop.next(_next_url(urls, location, hop.settings.max_redirects))
        urls.append(hop.url)


def _next_url(urls: list[WebUrl], location: str, max_redirects: int) -> WebUrl:
    current = urls[-1]
    try:
        target = current.join(location)
    except WorkerError as error:
        what = f"The server redirects to a URL that is not allowed: {error.what}"
        raise SourceDenied(what, current.name, error.remedy) from error
    if current.scheme == "https" and target.scheme == "http":
        what = f"The server redirects from https to http: {target.name}"
        raise SourceDenied(what, current.name, "Give a URL whose redirects stay on https")
    if target in urls:
        chain = " -> ".join(each.name for each in (*urls, target))
        raise SourceDenied(f"The redirects form a loop: {chain}", urls[0].name, "Report this to the server's owner")
    if len(urls) > max_redirects:
        what = f"More than {max_redirects} redirects"
        raise SourceDenied(what, urls[0].name, f"Give the last URL itself: {target.name}")
    return target


@contextmanager
def translating(where: str) -> Iterator[None]:
    """Turn the errors of a connection into a WorkerError while the block runs."""
    try:
        yield
    except (HTTPException, OSError) as error:
        raise translate_error(error, where) from error


def translate_error(error: BaseException, where: str) -> WorkerError:
    """Return the WorkerError for an error of a connection."""
    if isinstance(error, AddressRefused):
        remedy = "Only public addresses are allowed. Add other networks to download.allow_networks"
        return SourceDenied(str(error), where, remedy)
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceDenied(
            f"The server's certificate is not trusted: {error.verify_message}",
            where,
            "For a private certificate authority, set ca_file to its certificate",
        )
    what = "The connection failed" if isinstance(error, OSError) else "The answer is not valid HTTP"
    return SourceUnavailable(f"{what}: {error}", where, "Check the server, and the network between")


def refusal(answer: HttpResponse, sent: Mapping[str, str], where: str = "") -> WorkerError:
    """Return the error for an answer without the requested bytes. *sent* are the caller's headers of the request."""
    status, where = answer.status_code, where or answer.web_url.name
    if status in (404, 410):
        return SourceNotFound(f"The server has no such object (status {status})", where, "Check the URL")
    if status in (401, 403) and any(name.lower() == "authorization" for name in sent):
        what = f"The server refused the user, password or token of the request (status {status})"
        return SourceDenied(what, where, "Correct the credentials that the job names, or its header Authorization")
    if status in (401, 403, 407):
        return SourceDenied(
            f"The server refused the request (status {status})",
            where,
            "Give headers or credentials, or a link that is still valid",
        )
    if status in (408, 425, 429) or status >= 500 or status < 300:
        busy = SourceUnavailable(f"The server cannot send the file now (status {status})", where, "Check the server")
        busy.after_s = wait_wanted(answer.headers)
        return busy
    what = f"The server does not accept the request (status {status})"
    return SourceDenied(what, where, "Check the URL and the headers")
