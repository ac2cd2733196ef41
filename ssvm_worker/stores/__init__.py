"""Open image stores by URL. A store's module is imported only when such a store is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ssvm_worker.errors import ConfigError, InvalidRequest
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.streaming.interfaces import Check, Owner, Sink, Source, Store

if TYPE_CHECKING:
    from .s3.client import S3Settings


def open_store(name: str, url: str, **values: Any) -> Store:
    """Return the image store of a URL, without any access to it.

    S3 takes the fields of S3Settings in *values*, and *check*, which the store calls while it waits. NFS takes the
    fields of NfsSettings. A directory takes *shared*.
    Raises ConfigError for an invalid URL or value.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"Unknown store scheme {scheme!r}",
            f"stores.{name}.url",
            f"Give one of {', '.join(SCHEMES)}, for example file:///srv/x",
        )
    return SCHEMES[scheme](name, url, values)


def _file(name: str, url: str, values: Mapping[str, Any]) -> Store:
    from .file.store import FileStore

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.path in ("", "/") or parts.query or parts.fragment:
        what = f"The URL does not name a directory of this machine: {url}"
        raise ConfigError(what, f"stores.{name}.url", "Give file:///absolute/path")
    return FileStore(name, Path(unquote(parts.path)), shared=values.get("shared", False))


def _s3(name: str, url: str, values: Mapping[str, Any]) -> Store:
    from .s3.store import S3Store

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(
            f"The URL names no bucket: {url}", f"stores.{name}.url", "Give s3://BUCKET or s3://BUCKET/PREFIX"
        )
    try:
        settings = _s3_settings({key: value for key, value in values.items() if key not in ("check", "shared")})
        return S3Store(name, bucket, prefix, settings, values.get("check") or _never_cancelled)
    except InvalidRequest as error:
        raise ConfigError(error.what, f"stores.{name}.url", error.remedy) from error


def _nfs(name: str, url: str, values: Mapping[str, Any]) -> Store:
    from .nfs.store import NfsSettings, NfsStore

    known = [field.name for field in fields(NfsSettings)]
    return NfsStore(name, url, NfsSettings(**{key: values[key] for key in known if key in values}))


#: All kinds of stores. To add a kind, add a module and a line here.
SCHEMES: dict[str, Callable[[str, str, Mapping[str, Any]], Store]] = {"file": _file, "nfs": _nfs, "s3": _s3}


def open_destination(
    url: str, size: int, *, owner: Owner, headers: Mapping[str, str] | None = None, **values: Any
) -> Sink:
    """Return the sink for an upload of *size* bytes to ``s3://bucket/key`` or, by PUT, to an http(s) URL.

    S3 takes the fields of S3Settings in *values*. HTTP takes *rule* and *http_ca_file*. The sink calls *check* while
    it waits. Raises InvalidRequest for any other URL.
    """
    ca_file, check = values.pop("http_ca_file", None), values.pop("check", None) or _never_cancelled
    rule = values.pop("rule", None) or AddressRule()
    scheme = _scheme(url)
    if scheme == "s3":
        from .s3.store import s3_destination

        return s3_destination(url, _s3_settings(values), size, owner, check)
    if scheme in ("http", "https"):
        from ssvm_worker.net.http import HttpOptions

        from .http_put import PutSink

        return PutSink(url, size, HttpOptions(rule, ca_file=ca_file), headers=headers, check=check)
    raise InvalidRequest(
        "Uploads to this scheme are not supported", scheme[:40], "Give s3://BUCKET/KEY or an http(s) URL"
    )


def _scheme(url: str) -> str:
    """Return the scheme. Upper and lower case are equal: RFC 3986, 3.1."""
    return url.partition("://")[0].lower()


def _never_cancelled() -> None:
    """Do nothing. The default *check* of callers that cannot be cancelled."""


def open_origin(url: str, *, check: Check | None = None, **values: Any) -> Source:
    """Return the source of ``s3://bucket/key``, without any access to it. The bucket may have any owner."""
    from .s3.store import s3_origin

    return s3_origin(url, _s3_settings(values), check or _never_cancelled)


def sweep_destination(url: str, *, check: Check | None = None, **values: Any) -> int:
    """Abort the open uploads of earlier attempts at an upload's destination. Return their number."""
    if _scheme(url) != "s3":
        return 0
    from .s3.store import sweep_s3_destination

    return sweep_s3_destination(url, _s3_settings(values), check or _never_cancelled)


def _s3_settings(values: Mapping[str, Any]) -> S3Settings:
    from .s3.client import S3Settings

    known = [field.name for field in fields(S3Settings)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"Unknown S3 setting {unknown[0]!r}", "s3", f"Known settings: {', '.join(known)}")
    plain: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return S3Settings(**plain)
