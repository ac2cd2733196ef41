"""Find the credentials that a request names, and check that its URL may receive them."""

from __future__ import annotations

import base64
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from ssvm_worker.errors import ConfigError, InvalidRequest, misused
from ssvm_worker.net.urls import DEFAULT_PORTS

from .schema import CredentialsSection, Settings

#: Schemes that encrypt.
_ENCRYPTED = ("https", "sftp", "scp")


def named_credentials(settings: Settings, name: str | None, url: str) -> CredentialsSection | None:
    """Return the section that the ``credentials`` of a request name.

    Returns None without a name, and for the name of an image store, which has keys only. Raises InvalidRequest if the
    name is unknown or the host or bucket of *url* is not allowed. Raises ConfigError if the section lists no hosts.
    """
    if name is None or name in settings.stores:
        return None
    if name not in settings.credentials:
        known = ", ".join(settings.credentials) or "none"
        what = f"There are no credentials named {name!r}"
        raise misused(InvalidRequest(what, "credentials", f"The settings have: {known}"))
    named = settings.credentials[name]
    if url.partition(":")[0].lower() == "s3":
        bucket = url.partition("://")[2].partition("/")[0]
        if named.buckets and not any(fnmatchcase(bucket, each) for each in named.buckets):
            raise InvalidRequest(
                f"The credentials {name!r} are not for the bucket {bucket[:64]!r}",
                "credentials",
                f"credentials.{name}.buckets has: {', '.join(named.buckets)}",
            )
    elif named.username or named.token or named.certificate_file or named.private_key_file:
        _check_host(named, name, url)
    return named


def _check_host(named: CredentialsSection, name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port
    except ValueError as error:
        # The text of the error repeats parts of the URL, which may be secret.
        raise misused(InvalidRequest("The URL is malformed", "url", "Give https://host/path")) from error
    if not named.hosts:
        raise ConfigError(
            f"The credentials {name!r} list no hosts that may receive them",
            f"credentials.{name}.hosts",
            f'Add hosts = ["{host}"] to allow that host',
        )
    port = port or DEFAULT_PORTS.get(parts.scheme)
    if not any(_matches(host, port, each.lower()) for each in named.hosts):
        raise InvalidRequest(
            f"The credentials {name!r} are not for the host {host[:64]!r}",
            "credentials",
            f"credentials.{name}.hosts has: {', '.join(named.hosts)}",
        )
    if parts.scheme not in _ENCRYPTED and not named.allow_plaintext:
        raise InvalidRequest(
            f"The credentials {name!r} may not be sent without encryption over {parts.scheme}://",
            "url",
            f"Give an https:// or sftp:// URL, or set credentials.{name}.allow_plaintext",
        )


def _matches(host: str, port: int | None, pattern: str) -> bool:
    host_pattern, _, port_text = pattern.rpartition(":")
    if port_text.isdecimal() and (host_pattern.endswith("]") or (host_pattern and ":" not in host_pattern)):
        return fnmatchcase(host, host_pattern.strip("[]")) and port == int(port_text)
    return fnmatchcase(host, pattern.strip("[]"))


def authorization(named: CredentialsSection | None) -> dict[str, str]:
    """Return the Authorization header for a token or a user name. Return no header for other credentials."""
    if named and named.token:
        return {"Authorization": f"Bearer {named.token.get_secret_value()}"}
    if named and named.username is not None:
        password = named.password.get_secret_value() if named.password else ""
        pair = base64.b64encode(f"{named.username}:{password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    return {}
