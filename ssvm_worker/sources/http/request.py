"""Follow the redirects of a GET, and translate the errors of HTTP."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException

from ssvm_worker.errors import SourceDenied, SourceNotFound, SourceUnavailable, WorkerError
from ssvm_worker.net.http import HttpOptions, HttpResponse, HttpSession
from ssvm_worker.net.http_response import wait_wanted
from ssvm_worker.net.sockets import AddressRefused
from ssvm_worker.net.urls import WebUrl
from ssvm_worker.streaming.interfaces import Check

from .parallel import ConnectionPolicy

_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class HttpSettings(HttpOptions):
    """Settings of HTTP downloads."""

    max_redirects: int = 5
    #: When to use several connections, and how many.
    parallel: ConnectionPolicy = field(default_factory=ConnectionPolicy)

    def without_client_certificate(self) -> HttpSettings:
        """Return the settings for any origin other than the caller's."""
        return replace(self, origin_ca_file=None, certificate=None)


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


def refusal(answer: HttpResponse, where: str = "") -> WorkerError:
    """Return the error for an answer without the requested bytes."""
    status, where = answer.status_code, where or answer.web_url.name
    if status in (404, 410):
        return SourceNotFound(f"The server has no such object (status {status})", where, "Check the URL")
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
