"""``nfs://host[:port]/export?vers=4.2&nconnect=8``: an export, and mount options that are on a list.

docs/nfs.md argues the defaults. What is not on the list cannot be said: ``mount.nfs`` runs as root.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from ssvm_worker.errors import ConfigError

#: In this order, where the URL names none; not 4.0, as whoever has that has 4.1 or 3.
VERSIONS = ("4.2", "4.1", "3")
NFS_PORT = 2049
DEFAULTS = "hard,timeo=600,retrans=2,nconnect=4,lookupcache=positive,acdirmin=0,acdirmax=0"

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
#: No comma and nothing that a shell, sudoers or mountinfo would have to escape.
_PATH = re.compile(r"(/[A-Za-z0-9._@+-]+)+|/")

Rule = Callable[[str], bool]


def _within(least: int, most: int) -> Rule:
    return lambda value: value.isascii() and value.isdigit() and len(value) < 8 and least <= int(value) <= most


def _one_of(*known: str) -> Rule:
    return lambda value: value in known


def _address(value: str) -> bool:
    try:
        return bool(ipaddress.ip_address(value)) and "%" not in value
    except ValueError:
        return False


_flag = _one_of("")
#: Every option that a URL or the settings may have. A flag has no value.
ALLOWED: dict[str, Rule] = {
    "vers": _one_of("3", "4", "4.0", "4.1", "4.2"),
    "hard": _flag,
    "soft": _flag,
    "softerr": _flag,
    "softreval": _flag,
    "timeo": _within(1, 6000),
    "retrans": _within(0, 100),
    "nconnect": _within(1, 16),
    "rsize": _within(4096, 1048576),
    "wsize": _within(4096, 1048576),
    "actimeo": _within(0, 3600),
    "acregmin": _within(0, 3600),
    "acregmax": _within(0, 3600),
    "acdirmin": _within(0, 3600),
    "acdirmax": _within(0, 3600),
    "lookupcache": _one_of("all", "none", "pos", "positive"),
    "proto": _one_of("tcp", "tcp6", "rdma"),
    "mountport": _within(1, 65535),
    "sec": _one_of("sys", "krb5", "krb5i", "krb5p"),
    "xprtsec": _one_of("none", "tls", "mtls"),
    "resvport": _flag,
    "noresvport": _flag,
    "nosharecache": _flag,
    "clientaddr": _address,
}
#: Of each, the last one given holds: a URL's takes the place of the defaults'.
_EXCLUSIVE = ({"hard", "soft", "softerr"}, {"resvport", "noresvport"})


@dataclass(frozen=True)
class Export:
    """What is mounted, and how."""

    #: A name, an IPv4 address, or an IPv6 address in brackets.
    host: str
    port: int
    path: str
    options: Mapping[str, str]

    @property
    def source(self) -> str:
        """As ``mount.nfs`` takes it and mountinfo shows it."""
        return f"{self.host}:{self.path}"

    @property
    def versions(self) -> tuple[str, ...]:
        """To be tried in this order."""
        return (self.options["vers"],) if "vers" in self.options else VERSIONS

    def option_text(self, version: str) -> str:
        """What follows ``-o``. One try only, as the worker has retries of its own; no locks, as it takes none."""
        options = {**self.options, "vers": version, "port": str(self.port), "retry": "0"}
        if version == "3":
            options["nolock"] = ""
        return ",".join(f"{name}={value}" if value else name for name, value in options.items())

    @property
    def slug(self) -> str:
        """Names its directory: readable, and another for each way of mounting it."""
        text = f"{self.source} {self.port} {sorted(self.options.items())}"
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", self.source).strip("_")[:80]
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def parse_export(name: str, url: str, defaults: str = DEFAULTS) -> Export:
    """The export of that store's URL; ConfigError names what is wrong and what is allowed."""
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
        what = "No NFS export; a path has letters, digits and ._@+-"
        raise ConfigError(f"{what}: {url}", f"stores.{name}.url", "Give nfs://HOST/EXPORT, or nfs://HOST:PORT/EXPORT")
    given = parse_qsl(parts.query, keep_blank_values=True, separator="&")
    return Export(host, port, path, _merged(_options(defaults), _checked(given, f"stores.{name}.url")))


def check_options(text: str) -> str:
    """Default options as the settings have them, ``hard,timeo=600``; ValueError says which is wrong."""
    try:
        _options(text)
    except ConfigError as error:
        raise ValueError(f"{error.what}. {error.remedy}") from None
    return text


def _options(text: str) -> dict[str, str]:
    pairs = (each.partition("=") for each in text.split(",") if each)
    return _checked([(key, value) for key, _, value in pairs], "nfs.options")


def _checked(given: list[tuple[str, str]], where: str) -> dict[str, str]:
    for key, value in given:
        if key not in ALLOWED:
            raise ConfigError(f"No mount option {key!r} is taken", where, f"Allowed are: {', '.join(ALLOWED)}")
        if not ALLOWED[key](value):
            raise ConfigError(f"The mount option {key} takes no {value!r}", where, "nfs(5) says what it takes")
    return _merged({}, dict(given))


def _merged(under: dict[str, str], over: dict[str, str]) -> dict[str, str]:
    out = dict(under)
    for key, value in over.items():
        for group in _EXCLUSIVE:
            for other in group if key in group else ():
                out.pop(other, None)
        out[key] = value
    return out


def _host(host: str) -> str:
    """ValueError for what is neither a name nor an address."""
    if ":" in host:
        return f"[{ipaddress.IPv6Address(host)}]"
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise ValueError(host)
    return host
