"""The URL of a broker, taken apart: ``redis://``, ``rediss://``, a unix socket, or Sentinels that know the master.

    sentinel://[user:password@]host[:26379],host,host[/DB]?master=NAME      sentinels:// is the same by TLS

User and password are those of the servers; Sentinels of their own password get it by ``sentinel_password``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlencode, urlsplit

_SENTINEL_PORT = 26379
_TLS = ("rediss", "sentinels", "amqps")


@dataclass(frozen=True)
class Sentinels:
    """Several servers behind one URL; *hosts* say which of them is the master now."""

    hosts: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    user: str | None = None
    password: str | None = None
    tls: bool = False
    ca_file: str | None = None
    sentinel_password: str | None = None

    @property
    def ssl(self) -> dict[str, str]:
        """What redis-py wants to know of TLS beside ``ssl=True``; empty without."""
        return tls_options(self.ca_file) if self.tls else {}

    @property
    def sentinel_options(self) -> dict[str, object]:
        """What redis-py wants to know of the Sentinels themselves."""
        secret = {"password": self.sentinel_password} if self.sentinel_password else {}
        return {**({"ssl": True} if self.tls else {}), **self.ssl, **secret}


def tls_options(ca_file: str | None) -> dict[str, str]:
    """The certificate is checked, by that authority or the system's."""
    return {"ssl_cert_reqs": "required", **({"ssl_ca_certs": ca_file} if ca_file else {})}


def sentinels(url: str) -> Sentinels | None:
    """What a Sentinel URL says, None for any other; ValueError says what is wrong with it."""
    parts = urlsplit(url)
    if parts.scheme not in ("sentinel", "sentinels"):
        return None
    query = _query(parts)
    if not query.get("master"):
        raise ValueError("the name of the master is missing: sentinel://host,host/0?master=NAME")
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    return Sentinels(
        hosts=tuple(_host(each) for each in hosts.split(",")),
        master=query["master"],
        db=_number(parts.path.strip("/")),
        user=unquote(user) or None,
        password=unquote(password) or None,
        tls=parts.scheme == "sentinels",
        ca_file=query.get("ssl_ca_certs"),
        sentinel_password=query.get("sentinel_password"),
    )


def _number(text: str) -> int:
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError("the database must be a number: sentinel://host,host/0?master=NAME")
    return int(text or 0)


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing: sentinel://host,host/0?master=NAME")
    return parts.hostname, parts.port or _SENTINEL_PORT


def completed(url: str, ca_file: object = None, sentinel_password: str | None = None) -> str:
    """The URL with what the settings say beside it, where it is of use; what the URL itself says stays."""
    parts = urlsplit(url)
    added: dict[str, str] = {}
    if parts.scheme in _TLS and ca_file:
        added["ssl_ca_certs"] = str(ca_file)
    if parts.scheme in ("sentinel", "sentinels") and sentinel_password:
        added["sentinel_password"] = sentinel_password
    missing = {name: value for name, value in added.items() if name not in _query(parts)}
    if not missing:
        return url
    return f"{url}{'&' if parts.query else '?'}{urlencode(missing)}"


def redis_url(url: str) -> str:
    """Celery's spelling of a unix socket in that of redis-py."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    return f"unix://{parts.path}?{urlencode({'db': _query(parts).get('virtual_host', '0').strip('/') or '0'})}"


def celery_url(url: str) -> str:
    """The same broker in the spelling that Celery takes; a certificate is checked unless the URL itself says otherwise.

    kombu does not check any for a bare rediss:// URL, while redis-py does. Of Sentinels it wants a URL for each.
    """
    if found := sentinels(url):
        login = f"{quote(found.user or '', '')}:{quote(found.password, '')}@" if found.password else ""
        shown_hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found.hosts]
        return ";".join(f"sentinel://{login}{each}/{found.db}" for each in shown_hosts)
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in _query(parts):
        return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"
    if parts.scheme != "unix":
        return url
    return f"redis+socket://{parts.path}?virtual_host={_query(parts).get('db', '0')}"


def without_login(url: str) -> tuple[str, dict[str, str]]:
    """The URL without user and password, and these as redis-py's own arguments."""
    login, at, _ = urlsplit(url).netloc.rpartition("@")
    user, _, password = login.partition(":")
    given = {"username": unquote(user), "password": unquote(password)}
    return url.replace(f"//{login}{at}", "//", 1), {name: value for name, value in given.items() if value}


def shown(url: str) -> str:
    """The URL without user, password and options; a password may hold what should have been quoted in it."""
    scheme, found, rest = url.partition("://")
    place = re.split("[?#]", rest, maxsplit=1)[0]
    if not found or "@" in rest[len(place) :]:
        return f"{scheme}://***" if found else "***"
    return f"{scheme}://{place.rpartition('@')[2]}"


def check_port(url: str) -> None:
    """Raise ValueError, which does not repeat the URL, for one whose host or port cannot be read."""
    try:
        hosts = urlsplit(url).netloc.rpartition("@")[2]
        _ = [urlsplit(f"//{each}").port for each in hosts.split(",")]
    except ValueError:
        raise ValueError("host or port is wrong; write / ? # @ and : of a password as %2F %3F %23 %40 %3A") from None


def _query(parts: SplitResult) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(parts.query).items()}
