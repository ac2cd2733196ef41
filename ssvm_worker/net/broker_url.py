"""Parse and convert the URL of a broker: ``redis://``, ``rediss://``, a unix socket, or Redis Sentinel.

    sentinel://[user:password@]host[:26379],host,host[/DB]?master=NAME      sentinels:// is the same over TLS

User and password are those of the Redis servers. ``sentinel_password`` is the password of the Sentinels themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlencode, urlsplit

_SENTINEL_PORT = 26379
_TLS = ("rediss", "sentinels", "amqps")


@dataclass(frozen=True)
class Sentinels:
    """Parsed URL of Redis Sentinels. *hosts* are the Sentinels, which know the current master."""

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
        """Return the TLS arguments of redis-py in addition to ``ssl=True``. Empty without TLS."""
        return tls_options(self.ca_file) if self.tls else {}

    @property
    def sentinel_options(self) -> dict[str, object]:
        """Return the arguments of redis-py for connections to the Sentinels."""
        secret = {"password": self.sentinel_password} if self.sentinel_password else {}
        return {**({"ssl": True} if self.tls else {}), **self.ssl, **secret}


def tls_options(ca_file: str | None) -> dict[str, str]:
    """Return arguments of redis-py that verify the certificate, with *ca_file* or with the CAs of the system."""
    return {"ssl_cert_reqs": "required", **({"ssl_ca_certs": ca_file} if ca_file else {})}


def sentinels(url: str) -> Sentinels | None:
    """Parse a Sentinel URL. Return None for any other URL. Raise ValueError if it is malformed."""
    parts = urlsplit(url)
    if parts.scheme not in ("sentinel", "sentinels"):
        return None
    query = _query(parts)
    if not query.get("master"):
        raise ValueError("the name of the master is missing: sentinel://host,host/0?master=NAME")
    database = parts.path.strip("/")
    if database and not re.fullmatch("[0-9]{1,9}", database):
        raise ValueError("the database must be a number: sentinel://host,host/0?master=NAME")
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    return Sentinels(
        hosts=tuple(_host_and_port(each) for each in hosts.split(",")),
        master=query["master"],
        db=int(database or 0),
        user=unquote(user) or None,
        password=unquote(password) or None,
        tls=parts.scheme == "sentinels",
        ca_file=query.get("ssl_ca_certs"),
        sentinel_password=query.get("sentinel_password"),
    )


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing: sentinel://host,host/0?master=NAME")
    return parts.hostname, parts.port or _SENTINEL_PORT


def with_options(url: str, ca_file: object = None, sentinel_password: str | None = None) -> str:
    """Add the options of the settings to the query of the URL. Options that the URL has already take precedence."""
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
    """Convert Celery's URL of a unix socket to that of redis-py. Return any other URL unchanged."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    return f"unix://{parts.path}?{urlencode({'db': _query(parts).get('virtual_host', '0').strip('/') or '0'})}"


def celery_url(url: str) -> str:
    """Convert the URL of a broker to the form that Celery requires.

    kombu does not verify certificates for a rediss:// URL without options, while redis-py does. So this function adds
    the option, unless the URL has it. For Sentinels kombu requires one URL for each of them.
    """
    if found := sentinels(url):
        login = f"{quote(found.user or '', '')}:{quote(found.password, '')}@" if found.password else ""
        hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found.hosts]
        return ";".join(f"sentinel://{login}{each}/{found.db}" for each in hosts)
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in _query(parts):
        return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"
    if parts.scheme != "unix":
        return url
    return f"redis+socket://{parts.path}?virtual_host={_query(parts).get('db', '0')}"


def without_login(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL without user and password, and both as arguments of redis-py."""
    login, at, _ = urlsplit(url).netloc.rpartition("@")
    user, _, password = login.partition(":")
    credentials = {"username": unquote(user), "password": unquote(password)}
    return url.replace(f"//{login}{at}", "//", 1), {name: value for name, value in credentials.items() if value}


def shown(url: str) -> str:
    """Return the URL without user, password and options, for logs.

    This also works for a password with special characters that should have been quoted.
    """
    scheme, found, rest = url.partition("://")
    address = re.split("[?#]", rest, maxsplit=1)[0]
    if not found or "@" in rest[len(address) :]:
        return f"{scheme}://***" if found else "***"
    return f"{scheme}://{address.rpartition('@')[2]}"


def check_port(url: str) -> None:
    """Raise ValueError if host or port of the URL cannot be parsed. The error does not repeat the URL."""
    try:
        hosts = urlsplit(url).netloc.rpartition("@")[2]
        _ = [urlsplit(f"//{each}").port for each in hosts.split(",")]
    except ValueError:
        raise ValueError("host or port is wrong. Write / ? # @ and : of a password as %2F %3F %23 %40 %3A") from None


def _query(parts: SplitResult) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(parts.query).items()}
