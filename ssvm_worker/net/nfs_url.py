"""Parse ``nfs://host[:port]/export?vers=4.2&nconnect=8``: an export, and mount options of a fixed list.

docs/how-to/nfs.md explains the defaults. Other options are refused, because ``mount.nfs`` runs as root.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from ssvm_worker.errors import ConfigError

#: The versions to try, in this order, if the URL names none. 4.0 is missing: servers with 4.0 also have 4.1 or 3.
VERSIONS = ("4.2", "4.1", "3")
NFS_PORT = 2049
DEFAULTS = "hard,timeo=600,retrans=2,nconnect=4,lookupcache=positive,acdirmin=0,acdirmax=0"

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
#: Neither a comma nor a character that a shell, sudoers or mountinfo would have to escape.
_PATH = re.compile(r"(/[A-Za-z0-9._@+-]+)+|/")

Rule = Callable[[str], bool]


def _between(low: int, high: int) -> Rule:
    return lambda value: value.isascii() and value.isdigit() and len(value) < 8 and low <= int(value) <= high


def _one_of(*known: str) -> Rule:
    return lambda value: value in known


def _is_address(value: str) -> bool:
    try:
        return bool(ipaddress.ip_address(value)) and "%" not in value
    except ValueError:
        return False


_flag = _one_of("")
#: Every option that a URL or the settings may contain. A flag has no value.
ALLOWED: dict[str, Rule] = {
    "vers": _one_of("3", "4", "4.0", "4.1", "4.2"),
    "hard": _flag,
    "soft": _flag,
    "softerr": _flag,
    "softreval": _flag,
    "timeo": _between(1, 6000),
    "retrans": _between(0, 100),
    "nconnect": _between(1, 16),
    "rsize": _between(4096, 1048576),
    "wsize": _between(4096, 1048576),
    "actimeo": _between(0, 3600),
    "acregmin": _between(0, 3600),
    "acregmax": _between(0, 3600),
    "acdirmin": _between(0, 3600),
    "acdirmax": _between(0, 3600),
    "lookupcache": _one_of("all", "none", "pos", "positive"),
    "proto": _one_of("tcp", "tcp6", "rdma"),
    "mountport": _between(1, 65535),
    "sec": _one_of("sys", "krb5", "krb5i", "krb5p"),
    "xprtsec": _one_of("none", "tls", "mtls"),
    "resvport": _flag,
    "noresvport": _flag,
    "nosharecache": _flag,
    "clientaddr": _is_address,
}
#: Options that exclude each other. The last one counts, so an option of a URL replaces the default.
_EXCLUSIVE = ({"hard", "soft", "softerr"}, {"resvport", "noresvport"})


@dataclass(frozen=True)
class Export:
    """An export with its mount options."""

    #: A name, an IPv4 address, or an IPv6 address in brackets.
    host: str
    port: int
    path: str
    options: Mapping[str, str]

    @property
    def source(self) -> str:
        """Return the source in the form that ``mount.nfs`` takes and mountinfo shows."""
        return f"{self.host}:{self.path}"

    @property
    def versions(self) -> tuple[str, ...]:
        """Return the NFS versions to try, in this order."""
        return (self.options["vers"],) if "vers" in self.options else VERSIONS

    def option_text(self, version: str) -> str:
        """Return the value of ``-o``.

        The options disable retries, because the worker retries itself, and locks, because the worker takes none.
        """
        options = {**self.options, "vers": version, "port": str(self.port), "retry": "0"}
        if version == "3":
            options["nolock"] = ""
        return ",".join(f"{name}={value}" if value else name for name, value in options.items())

    @property
    def slug(self) -> str:
        """Return a readable name for its mount point. The name differs for different options."""
        text = f"{self.source} {self.port} {sorted(self.options.items())}"
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", self.source).strip("_")[:80]
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def parse_export(name: str, url: str, defaults: str = DEFAULTS) -> Export:
    """Parse the URL of the store *name*. Raise ConfigError for an invalid URL or a forbidden option."""
    parts = urlsplit(url)
    path = unquote(parts.path).rstrip("/") or "/"
    try:
        host, port = _host(parts.hostname or ""), parts.port or NFS_PORT
    except ValueError:
        host, port = "", 0
    if (
        not host
        or not _PATH.fullmatch(path)
        or ".." in path.split("/")
        or parts.fragment
        or set("@%") & set(parts.netloc)
    ):
        what = "Invalid NFS export. The path may have letters, digits and ._@+-"
        raise ConfigError(f"{what}: {url}", f"stores.{name}.url", "Give nfs://HOST/EXPORT, or nfs://HOST:PORT/EXPORT")
    options = parse_qsl(parts.query, keep_blank_values=True, separator="&")
    return Export(host, port, path, _merged(_options(defaults), _checked(options, f"stores.{name}.url")))


def check_options(text: str) -> str:
    """Return the options of the settings (``hard,timeo=600``) if they are allowed, else raise ValueError."""
    try:
        _options(text)
    except ConfigError as error:
        raise ValueError(f"{error.what}. {error.remedy}") from None
    return text


def _options(text: str) -> dict[str, str]:
    pairs = (each.partition("=") for each in text.split(",") if each)
    return _checked([(key, value) for key, _, value in pairs], "nfs.options")


def _checked(options: list[tuple[str, str]], location: str) -> dict[str, str]:
    for key, value in options:
        if key not in ALLOWED:
            what = f"The mount option {key!r} is not allowed"
            raise ConfigError(what, location, f"Allowed are: {', '.join(ALLOWED)}")
        if not ALLOWED[key](value):
            what = f"Invalid value {value!r} of the mount option {key}"
            raise ConfigError(what, location, "See nfs(5) for its values")
    return _merged({}, dict(options))


def _merged(defaults: dict[str, str], options: dict[str, str]) -> dict[str, str]:
    merged = dict(defaults)
    for key, value in options.items():
        for group in _EXCLUSIVE:
            for other in group if key in group else ():
                merged.pop(other, None)
        merged[key] = value
    return merged


def _host(host: str) -> str:
    """Return the host, an IPv6 address in brackets. Raise ValueError if it is neither a name nor an address."""
    if ":" in host:
        return f"[{ipaddress.IPv6Address(host)}]"
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise ValueError(host)
    return host
