"""Turn paths of a management server into keys, split its URLs, and refuse hostile ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.errors import InvalidRequest

#: The directory in which the Java agent mounts a store. Its answers have it, and the server sends it back.
_MOUNT = re.compile(r"/mnt/SecStorage/[0-9A-Za-z-]+/")


def key_of(path: str | None, check: Callable[[str], str] = check_key) -> str:
    """Return the key of a path: without the Java agent's mount directory, and without needless slashes.

    Raise InvalidRequest for an empty path, and for one that *check* refuses because it could leave the store.
    """
    text = path or ""
    if match := _MOUNT.match(text):
        text = text[match.end() :]
    parts = [each for each in text.split("/") if each]
    if not parts:
        raise InvalidRequest("The command has no path", "path")
    return check("/".join(parts))


def parts_of(url: str) -> SplitResult:
    """Return the parts of a URL. Raise InvalidRequest if it is malformed. The error does not show it."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InvalidRequest("The URL is malformed", "url") from error
    return parts
