"""Image stores by the scheme of their URL. The modules below are imported when a store of theirs is first wanted."""

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
    """The image store behind a URL. Touches nothing yet.

    *values* are S3Settings' for S3, with *check*, which is called while it waits; NfsSettings' for NFS; a directory
    leaves them aside.
    Raises ConfigError for a URL or a value that no store takes.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"There is no store for {scheme!r}",
            f"stores.{name}.url",
            f"Give one of {', '.join(SCHEMES)}, as file:///srv/x",
        )
    return SCHEMES[scheme](name, url, values)


def _file(name: str, url: str, _: Mapping[str, Any]) -> Store:
    from .file.store import FileStore

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.path in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"No directory of this machine: {url}", f"stores.{name}.url", "Give file:///absolute/path")
    return FileStore(name, Path(unquote(parts.path)))


def _s3(name: str, url: str, values: Mapping[str, Any]) -> Store:
    from .s3.store import S3Store

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    try:
        plain = {key: value for key, value in values.items() if key != "check"}
        return S3Store(name, bucket, prefix, _s3_settings(plain), values.get("check") or _unchecked)
    except InvalidRequest as error:
        raise ConfigError(error.what, f"stores.{name}.url", error.remedy) from error


def _nfs(name: str, url: str, values: Mapping[str, Any]) -> Store:
    from .nfs.store import NfsSettings, NfsStore

    known = [field.name for field in fields(NfsSettings)]
    return NfsStore(name, url, NfsSettings(**{key: values[key] for key in known if key in values}))


#: The one list of stores: a new one is a module and a line here.
SCHEMES: dict[str, Callable[[str, str, Mapping[str, Any]], Store]] = {"file": _file, "nfs": _nfs, "s3": _s3}


def open_destination(
    url: str, size: int, *, owner: Owner, headers: Mapping[str, str] | None = None, **values: Any
) -> Sink:
    """Where an upload of *size* bytes goes: ``s3://bucket/key``, or an http(s) URL that takes a PUT.

    *values* are S3Settings' for the first; *rule* and *http_ca_file* for the second; *check* is called while it waits.
    Raises InvalidRequest for neither.
    """
    ca_file, check = values.pop("http_ca_file", None), values.pop("check", None) or _unchecked
    rule = values.pop("rule", None) or AddressRule()
    if url.startswith("s3://"):
        from .s3.store import s3_destination

        return s3_destination(url, _s3_settings(values), size, owner, check or _unchecked)
    if url.startswith(("http://", "https://")):
        from .http_put import PutSettings, PutSink

        return PutSink(url, size, PutSettings(rule=rule, ca_file=ca_file), headers=headers, check=check)
    raise InvalidRequest(
        "Nothing can be uploaded there", url.partition("://")[0][:40], "Give s3://BUCKET/KEY or an http(s) URL"
    )


def _unchecked() -> None:
    """For callers that cannot be cancelled."""


def open_origin(url: str, *, check: Check | None = None, **values: Any) -> Source:
    """The object behind ``s3://bucket/key``, which may be anybody's. Touches nothing."""
    from .s3.store import s3_origin

    return s3_origin(url, _s3_settings(values), check or _unchecked)


def sweep_destination(url: str, *, check: Check | None = None, **values: Any) -> int:
    """Abort what dead attempts have left open at an upload's destination; returns how many there were."""
    if not url.startswith("s3://"):
        return 0
    from .s3.store import sweep_s3_destination

    return sweep_s3_destination(url, _s3_settings(values), check or _unchecked)


def _s3_settings(values: Mapping[str, Any]) -> S3Settings:
    from .s3.client import S3Settings

    known = [field.name for field in fields(S3Settings)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"S3 has no setting {unknown[0]!r}", "s3", f"It has: {', '.join(known)}")
    plain: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return S3Settings(**plain)
