"""Parse and check URLs of users, and make them safe to log. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

from ssvm_worker.errors import InvalidRequest

#: The port of a URL without one, for each scheme of a source.
DEFAULT_PORTS = {"http": 80, "https": 443, "ftp": 21, "sftp": 22, "scp": 22}
_WEB = ("http", "https")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
#: Characters that RFC 3986 allows in a path or query. It includes ``%``, because users quote their URLs themselves.
_KEPT = "/%:@!$&'()*+,;=~-._?[]"
_ASCII = "".join(map(chr, range(128)))
#: token and field-value of RFC 9110, sections 5.1 and 5.5. A line break could start a second header.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


@dataclass(frozen=True)
class WebUrl:
    """An absolute URL without credentials."""

    scheme: str
    host: str
    port: int
    #: Path and query, quoted as in a request line.
    target: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """Return scheme, host and port. Credentials belong to an origin (RFC 6454)."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """Return the value of the Host header. It contains the port only if it is not the default of the scheme."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """Return the URL for logs, without the values of its query: a presigned URL has its signature there."""
        path, mark, query = self.target.partition("?")
        hidden = "&".join(f"{each.partition('=')[0]}=***" if "=" in each else "***" for each in query.split("&"))
        return f"{self.scheme}://{self.authority}{path}{mark}{hidden if mark else ''}"

    @property
    def path(self) -> str:
        """Return the unquoted path, as file servers expect it."""
        return unquote(self.target)

    @property
    def file_name(self) -> str:
        """Return the last part of the path. It is a label and must not become a key."""
        return self.target.partition("?")[0].rpartition("/")[2]

    def join(self, location: str) -> WebUrl:
        """Return the target of a redirect. Raises the same errors as ``parse``.

        In *location* each character is one byte, as ``http.client`` returns it. Servers send UTF-8 or another encoding
        of their file names. They must get the same bytes back.
        """
        sent = location.encode("latin-1", "replace")
        try:
            text = sent.decode()
        except UnicodeDecodeError:
            text = quote(sent, safe=_ASCII)
        try:
            joined = urljoin(f"{self.scheme}://{self.authority}{self.target}", text)
        except ValueError as error:
            raise InvalidRequest("Invalid URL", "url", "Give http(s)://host/path") from error
        return parse(joined)


def parse(url: str, schemes: Sequence[str] = _WEB) -> WebUrl:
    """Parse a URL.

    Raises InvalidRequest for an invalid URL, another scheme, or a user name in the URL. Its text contains no secret.
    """
    if _SURROGATE.search(url):
        raise InvalidRequest("The URL has half of a surrogate pair", "url", "Give the URL in valid Unicode")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError as error:  # its text may repeat a password instead of the port
        raise InvalidRequest("The URL's host or port is malformed", "url", "Give http(s)://host:port/path") from error
    if parts.scheme not in schemes:
        known = " or ".join(schemes)
        raise InvalidRequest(f"URLs of scheme {parts.scheme[:20]!r} are not supported", "url", f"Give an {known} URL")
    if "@" in parts.netloc:
        what, shown = "The URL has a user name or password", f"{parts.scheme}://***@{host}"
        raise InvalidRequest(what, shown, "Give them as headers or credentials")
    host = _ascii(host)
    if not _is_host(host) or _CONTROL.search(url):
        raise InvalidRequest(
            "The URL has no valid host, or it has control characters", "url", "Give http(s)://host/path"
        )
    if schemes is not _WEB and (parts.query or _CONTROL.search(unquote(parts.path)) or parts.path in ("", "/")):
        raise InvalidRequest("The URL names no file", "url", f"Give {parts.scheme}://host/path")
    target = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    return WebUrl(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], target)


def is_proxy_url(url: str, schemes: Sequence[str] = ("http",)) -> bool:
    """Return whether *url* is ``SCHEME://[user:password@]host[:port]`` and nothing else."""
    try:
        parts = urlsplit(url)
        is_port = parts.port != 0
    except ValueError:
        return False
    rest = parts.path.strip("/") or parts.query or parts.fragment
    is_known = parts.scheme in schemes and _is_host(parts.hostname or "")
    return bool(is_known and is_port and not rest and not _CONTROL.search(url))


def _is_host(host: str) -> bool:
    """Return whether *host* is an address, or a name with labels of 1 to 63 characters (RFC 1035, section 2.3.4)."""
    labels = host.removesuffix(".").split(".")
    return bool(_HOST.fullmatch(host)) and (":" in host or all(0 < len(label) < 64 for label in labels))


def _ascii(host: str) -> str:
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError as error:
        raise InvalidRequest(f"Invalid host name: {error}", "url", "Give the ASCII form of the host (xn--…)") from error


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of the request. Raise InvalidRequest for an invalid one; the error does not show its value."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            remedy = "Remove line breaks and control characters"
            raise InvalidRequest("Invalid header", repr(name[:60]), remedy)
        if name.lower() in _RESERVED:
            raise InvalidRequest("The worker sets this header itself", name, "Remove it from the request")
    return dict(headers)


#: Headers that requests may not set.
_RESERVED = {
    *("host", "range", "if-range", "accept-encoding", "connection", "te", "expect", "upgrade"),
    *("content-length", "transfer-encoding"),
}
