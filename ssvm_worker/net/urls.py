"""The URLs that users give: taken apart, judged, and made safe to log. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

from ssvm_worker.errors import InvalidRequest

_PORTS = {"http": 80, "https": 443, "ftp": 21, "sftp": 22, "scp": 22}
_WEB = ("http", "https")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
#: What RFC 3986 lets stand in a path or query; ``%`` because the user has quoted what he meant to quote.
_KEPT = "/%:@!$&'()*+,;=~-._?[]"
_ASCII = "".join(map(chr, range(128)))
#: token and field-value of RFC 9110, 5.1 and 5.5: no line breaks, or a value could start a second header.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


@dataclass(frozen=True)
class WebUrl:
    """An absolute URL without credentials in it."""

    scheme: str
    host: str
    port: int
    #: Path and query, quoted, as it stands in a request line.
    target: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: what credentials are bound to (RFC 6454)."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """Safe to log: the values of a query (a presigned URL's signature) are left out."""
        path, mark, query = self.target.partition("?")
        hidden = "&".join(f"{each.partition('=')[0]}=***" if "=" in each else "***" for each in query.split("&"))
        return f"{self.scheme}://{self.authority}{path}{mark}{hidden if mark else ''}"

    @property
    def path(self) -> str:
        """The path as a file server takes it: nothing quoted, and no query."""
        return unquote(self.target)

    @property
    def file_name(self) -> str:
        """The last part of the path; a label, never a key."""
        return self.target.partition("?")[0].rpartition("/")[2]

    def join(self, location: str) -> WebUrl:
        """Return where a redirect leads; raise what ``parse`` raises.

        *location* is as ``http.client`` gives it: each character is a byte. Servers send UTF-8, or another encoding of
        their file names, which must come back to them as the same bytes.
        """
        sent = location.encode("latin-1", "replace")
        try:
            text = sent.decode()
        except UnicodeDecodeError:
            text = quote(sent, safe=_ASCII)
        try:
            joined = urljoin(f"{self.scheme}://{self.authority}{self.target}", text)
        except ValueError as error:
            raise InvalidRequest("This is no URL", "url", "Give http(s)://host/path") from error
        return parse(joined)


def parse(url: str, schemes: Sequence[str] = _WEB) -> WebUrl:
    """Take a URL apart; InvalidRequest for another scheme, userinfo, or what is no URL. Its text holds no secret."""
    if _SURROGATE.search(url):
        raise InvalidRequest("The URL holds half of a surrogate pair", "url", "Give the URL in valid Unicode")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError as error:  # its text may repeat a password as the port
        raise InvalidRequest("The URL's host or port is malformed", "url", "Give http(s)://host:port/path") from error
    if parts.scheme not in schemes:
        known = " or ".join(schemes)
        raise InvalidRequest(f"URLs of scheme {parts.scheme[:20]!r} are not taken", "url", f"Give an {known} URL")
    if "@" in parts.netloc:
        raise InvalidRequest(
            "The URL holds a user name or password",
            f"{parts.scheme}://***@{host}",
            "Give them as headers or credentials",
        )
    host = _ascii(host)
    if not _is_host(host) or _CONTROL.search(url):
        raise InvalidRequest("The URL has no valid host, or control characters", "url", "Give http(s)://host/path")
    if schemes is not _WEB and (parts.query or _CONTROL.search(unquote(parts.path)) or parts.path in ("", "/")):
        raise InvalidRequest("The URL names no file", "url", f"Give {parts.scheme}://host/path")
    target = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    return WebUrl(parts.scheme, host, port or _PORTS[parts.scheme], target)


def _is_host(host: str) -> bool:
    """Whether it is an address, or a name whose labels have 1 to 63 characters (RFC 1035, 2.3.4)."""
    labels = host.removesuffix(".").split(".")
    return bool(_HOST.fullmatch(host)) and (":" in host or all(0 < len(label) < 64 for label in labels))


def _ascii(host: str) -> str:
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError as error:
        raise InvalidRequest(f"This is no host name: {error}", "url", "Give the host's ASCII form (xn--…)") from error


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's headers; InvalidRequest for one that cannot be sent, naming it without its value."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidRequest(
                "That header cannot be sent", repr(name[:60]), "Leave out line breaks and control characters"
            )
        if name.lower() in _OURS:
            raise InvalidRequest("That header is ours to set", name, "Leave it out of the request")
    return dict(headers)


_OURS = {
    *("host", "range", "if-range", "accept-encoding", "connection", "te", "expect", "upgrade"),
    *("content-length", "transfer-encoding"),
}
