"""The data stream of one file of a lease: an HTTPS GET from the host that the lease names."""

from __future__ import annotations

import ssl
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.parse import SplitResult, urlsplit

from ssvm_worker.errors import LeaseLost, SourceDenied, SourceUnavailable, WorkerError
from ssvm_worker.net.http import HttpOptions, HttpResponse, HttpSession
from ssvm_worker.net.sockets import ConnectOptions, StallWatch, connect
from ssvm_worker.net.tls import PinMismatch, context_for, parse_thumbprint, thumbprint_of
from ssvm_worker.net.urls import WebUrl
from ssvm_worker.streaming.interfaces import CHUNK, Check
from ssvm_worker.units import KiB

from .trust import Address, failure_reason

#: Seconds to connect to a host.
_CONNECT_S = 10.0
#: Bytes to read ahead from a stream, because hosts send a body in HTTP chunks of 32 KiB.
_AHEAD = 512 * KiB


@dataclass(frozen=True)
class ExportLink:
    """The URL of a file of a lease, with the data that a connection to its host needs."""

    #: The URL from the lease. Its host may be ``*``.
    url: str
    #: Thumbprints of the host's certificate, received over the trusted connection: see ``pins_of``. May be empty.
    thumbprint: str
    #: The vCenter's address. It replaces data that the lease does not give.
    address: Address
    #: The session's cookie. The worker sends it only to a host that rejects a request without it.
    cookie: str = field(repr=False)

    @property
    def parts(self) -> SplitResult:
        """Return the URL with the address of the host that the settings give, if they give one."""
        parts = self._named_parts
        address = self.address.hosts.get(parts.hostname or "")
        if not address:
            return parts
        port = "" if urlsplit(f"//{address}").port else f":{parts.port or 443}"
        return parts._replace(netloc=f"{address}{port}")

    @property
    def _named_parts(self) -> SplitResult:
        """Return the URL; the vCenter's host and port replace ``*``."""
        parts = urlsplit(self.url)
        if parts.hostname != "*":
            return parts
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return parts._replace(netloc=f"{host}:{parts.port or self.address.port}")

    @property
    def pin(self) -> str | None:
        """Return the thumbprints from the lease, or the vCenter's own if the host is the vCenter itself."""
        if self.thumbprint:
            return " ".join(parse_thumbprint(each, self.parts.netloc) for each in self.thumbprint.split())
        return self.address.pin if self._named_parts.hostname == self.address.host else None

    @property
    def web_url(self) -> WebUrl:
        """Return the URL as the host expects it."""
        parts = self.parts
        return WebUrl("https", parts.hostname or "", parts.port or 443, parts.path)

    @property
    def options(self) -> HttpOptions:
        """Return the options of connections to the host. They trust only its authority or its thumbprint."""
        return HttpOptions(
            None,
            _CONNECT_S,
            self.address.stream_timeout_s,
            # A host that reads an empty area may send only a marker of 512 bytes each 45 s.
            # If the host has a problem, vSphere ends the lease. The check of the lease then ends the transfer.
            min_rate=0,
            tls=context_for(self.address.ca_file, self.pin),
            pin=self.pin,
            read_ahead=_AHEAD,
        )


def pins_of(certificate: str | None, thumbprint: str | None) -> str:
    """Return the thumbprints that vSphere gives for a host, with a space in between. The host may have either.

    Up to vSphere 8 there is a SHA-1 thumbprint. Since 9.0 there may be a PEM certificate or chain. It is not documented
    whether both can be set, and whether they then agree.
    """
    return f"{thumbprint_of(certificate or '')} {thumbprint or ''}".strip()


class DiskSource:
    """A ``Source`` of one file of a lease. It has no size and supports neither ranges nor resume.

    The host generates the bytes during the transfer. Status 200 does not prove that the stream is complete.
    The caller must verify the structure of the stream. Memory use: one chunk.
    """

    size: int | None = None
    resumable = False

    def __init__(self, link: ExportLink, check: Check, chunk_size: int = CHUNK) -> None:
        """*chunk_size*: the largest chunk in bytes."""
        self._link = link
        self._chunk_size = chunk_size
        self._check = check
        parts = link.parts
        #: The URL without the secret ticket in its path.
        self.name = f"{parts.netloc}/…/{parts.path.rpartition('/')[2]}"

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks. *offset* must be 0.

        Raises SourceUnavailable (busy, disconnected, stalled), LeaseLost (expired URL), SourceDenied and Cancelled.
        """
        if offset:
            raise SourceUnavailable("The stream of a lease cannot be resumed", self.name, "Request a new lease")
        with translated_stream(self.name, self._check), closing(self._get()) as answer:
            while chunk := answer.read(self._chunk_size):
                yield chunk

    def _get(self) -> HttpResponse:
        """Send the request without the cookie. If the host rejects it, send it again with the cookie."""
        session = HttpSession(self._link.options, self._check)
        answer = session.exchange("GET", self._link.web_url, {})
        if answer.status_code in (401, 403):
            answer.close()
            answer = session.exchange("GET", self._link.web_url, {"Cookie": self._link.cookie})
        if answer.status_code != 200:
            answer.close()
            raise self._refusal(answer.status_code)
        return answer

    def _refusal(self, status: int) -> WorkerError:
        if status == 404:
            return LeaseLost("The lease's URL has expired (status 404)", self.name, "Request a new lease")
        if status in (401, 403):
            return SourceDenied(f"The host denies access (status {status})", self.name, "Check the user's privileges")
        return SourceUnavailable(
            f"The host answered with status {status}", self.name, "The host may be busy; try again"
        )


def check_host(link: ExportLink, check: Check) -> None:
    """Connect to the host and check its certificate. Raises SourceUnavailable, SourceDenied and Cancelled."""
    with translated_stream(link.parts.netloc, check, "The host cannot be reached"):
        url, options = link.web_url, link.options
        how = ConnectOptions(None, options.connect_timeout_s, options.tls, pin=options.pin)
        connect(url.host, url.port, how, StallWatch(check, link.address.timeout_s)).close()


@contextmanager
def translated_stream(name: str, check: Check, what: str = "The stream broke") -> Iterator[None]:
    """Translate the errors of a connection to a host. *what* says what has failed."""
    try:
        yield
    except (ssl.SSLCertVerificationError, PinMismatch) as error:
        raise SourceDenied(
            f"The host's certificate is not trusted: {failure_reason(error)}",
            name,
            "vCenter gives no or another thumbprint for this host: check the host, or set ca_file to its authority",
        ) from error
    except (OSError, HTTPException) as error:
        check()  # prefer the error of a lost lease, which explains the broken connection
        raise SourceUnavailable(
            f"{what}: {error or type(error).__name__}", name, "Check the host and the network path to it"
        ) from error
