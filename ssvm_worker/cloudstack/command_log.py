"""Show commands and answers in the log: a few fields that contain no secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ssvm_worker.units import printable

from .frame import RawMessage

#: The fields to show. Other fields may have passwords, keys, or the secret part of a link.
_SHOWN = (
    *("request", "jobId", "resourceType", "id", "installPath", "path", "templatePath", "srcPath", "destPath"),
    *(
        "bucketName",
        "endPoint",
        "downloadStatus",
        "downloadPct",
        "status",
        "_dir",
        "msList",
        "lbAlgorithm",
        "reason",
        "result",
        "details",
    ),
)
_URLS = ("_url", "url", "secUrl", "datastoreUri")
#: Fields with objects whose fields are shown as well.
_NESTED = ("store", "_store", "data", "srcTO", "destTO", "imageDataStore", "dataStore", "newData")
#: The longest value and the longest line, in characters.
_MAX_VALUE, _MAX_LINE = 160, 500


def describe(message: RawMessage) -> str:
    """Return a message as one line, without secrets: ``DownloadCommand id=5 url=https://host/…``."""
    words = list(_words(message.content, 0))
    if isinstance(infos := message.content.get("templateInfos"), dict):
        words.append(f"{len(infos)} entries")
    return printable(" ".join([message.short, *dict.fromkeys(words)]))[:_MAX_LINE]


def _words(fields: Mapping[str, Any], depth: int) -> list[str]:
    found = []
    for name, value in fields.items():
        if name in _URLS and isinstance(value, str):
            found.append(f"{name.strip('_')}={_masked(value)}")
        elif name in _SHOWN and isinstance(value, str | int | float | list) and value not in ("", " ", []):
            found.append(f"{name.strip('_')}={str(value)[:_MAX_VALUE]}")
        elif name in _NESTED and isinstance(value, dict) and depth < 4:
            inner = next(iter(value.values()), None)
            found += _words(inner if isinstance(inner, dict) else value, depth + 1)
    return found


def _masked(url: str) -> str:
    """Return the URL without user, password and query. Return ``***`` if it is malformed."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "***"
    return f"{parts.scheme}://{host}{parts.path}"[:_MAX_VALUE] + ("?***" if parts.query else "")
