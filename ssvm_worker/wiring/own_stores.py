"""Refuse URLs of objects in image stores. Only jobs on artifacts may read or write there."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ssvm_worker.config.schema import Settings, StoreSection
from ssvm_worker.errors import InvalidRequest

_PORTS = {"http": 80, "https": 443}
_AMAZON = "amazonaws.com"
#: The maximum number of times that proxies in front of a store decode a path.
_DECODED = 3


def refuse_stores(settings: Settings, url: str, endpoint: str | None = None, allowed: Collection[str] = ()) -> None:
    """Raise InvalidRequest if *url* names an object of an image store that is not in *allowed*.

    *endpoint* is the service of an ``s3://`` URL, None for Amazon S3. Other spellings of the key or the host are
    recognised. The function resolves host names only if bucket and key match those of a store.
    """
    for name, store in settings.guarded_stores.items():
        if name not in allowed and _holds(store, url, endpoint, settings):
            raise InvalidRequest(
                f"The URL names an object of the image store {name!r}",
                "url",
                "Name the artifact in a job, or give a URL outside all image stores",
            )


def _holds(store: StoreSection, url: str, endpoint: str | None, settings: Settings) -> bool:
    scheme = url.partition(":")[0].lower()
    if scheme == "file":
        path = Path(unquote(urlsplit(url).path))
        directory = _directory(store, settings)
        with contextlib.suppress(OSError, ValueError):  # a NUL or a loop of links: opening the path fails
            return directory is not None and path.resolve().is_relative_to(directory.resolve())
        return False
    if not store.url.startswith("s3://"):
        return False
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    if scheme == "s3":
        name, _, key = url.partition("://")[2].partition("/")
        same_bucket = name.casefold() == bucket.casefold() and _is_inside(key, prefix)
        return same_bucket and _is_same_service(endpoint or "", store.endpoint or "")
    if scheme not in _PORTS:
        return False
    with contextlib.suppress(ValueError):  # the function that opens the URL refuses an invalid one
        keys = [key for key in _keys(url, bucket) if _is_inside(key, prefix)]
        return bool(keys) and _serves(url, bucket, store.endpoint or "")
    return False


def _directory(store: StoreSection, settings: Settings) -> Path | None:
    if store.url.startswith("nfs://"):
        return settings.mount_root
    return Path(unquote(urlsplit(store.url).path)) if store.url.startswith("file://") else None


def _is_inside(key: str, prefix: str) -> bool:
    wanted = _parts(prefix)
    for _ in range(_DECODED):
        if _parts(key)[: len(wanted)] == wanted:
            return True
        key = unquote(key)
    return False


def _parts(key: str) -> list[str]:
    """Return the components of a key as a file server resolves them: without empty ones, ``.`` and ``..``."""
    parts: list[str] = []
    for each in key.replace("\\", "/").split("/"):
        if each == "..":
            del parts[-1:]
        elif each not in ("", "."):
            parts.append(each)
    return parts


def _keys(url: str, bucket: str) -> Iterator[str]:
    """Yield the keys in *bucket* that an http(s) URL can mean. The bucket is in the path or in the host name."""
    parts = urlsplit(url)
    if (parts.hostname or "").casefold().startswith(bucket.casefold()):
        yield parts.path
    path = parts.path
    for _ in range(_DECODED):
        names = _parts(path)
        yield from ("/".join(names[at + 1 :]) for at, name in enumerate(names) if name.casefold() == bucket.casefold())
        path = unquote(path)


def _serves(url: str, bucket: str, endpoint: str) -> bool:
    """Return whether the host of the URL is the service or its host for the bucket.

    Ignores the port, because a presigned URL may have another one.
    """
    host = (urlsplit(url).hostname or "").rstrip(".").casefold()
    bare = host.removeprefix(f"{bucket.casefold()}.")
    service = (urlsplit(endpoint).hostname or _AMAZON).rstrip(".").casefold()
    if _is_amazon(service):
        return _is_amazon(host)
    return service in (host, bare) or _share_address(host, service)


def _is_same_service(one: str, other: str) -> bool:
    hosts = [(urlsplit(each).hostname or _AMAZON).rstrip(".").casefold() for each in (one, other)]
    if any(map(_is_amazon, hosts)):
        return all(map(_is_amazon, hosts))
    ports = [urlsplit(each).port or _PORTS.get(urlsplit(each).scheme, 0) for each in (one, other)]
    # A proxy may serve 80 and 443 for a service on another port.
    return (ports[0] == ports[1] or bool({80, 443} & set(ports))) and (hosts[0] == hosts[1] or _share_address(*hosts))


def _is_amazon(host: str) -> bool:
    return f".{host}".endswith((f".{_AMAZON}", f".{_AMAZON}.cn"))


def _share_address(one: str, other: str) -> bool:
    return bool(_addresses(one) & _addresses(other))


def _addresses(host: str) -> set[str]:
    """Return the addresses of *host*, empty for an unknown host. All addresses of this machine count as one."""
    try:
        found = {str(each[4][0]).partition("%")[0] for each in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return set()
    return {_canonical(each) for each in found}


def _canonical(address: str) -> str:
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return "localhost" if _is_local(ip) else str(ip)


def _is_local(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if ip.is_loopback or ip.is_unspecified:
        return True
    # Only addresses of this machine can be bound.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET) as probe:
        probe.bind((str(ip), 0))
        return True
    return False
