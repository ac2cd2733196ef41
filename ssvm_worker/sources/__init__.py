"""Where downloads come from: one class a URL scheme."""

from __future__ import annotations

from collections.abc import Mapping

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.stream import Check

from .exchange import HttpSettings
from .http import HttpSource, Validator

#: A new source is one new file and one line here.
SCHEMES: dict[str, type[HttpSource]] = {"http": HttpSource, "https": HttpSource}


def open_source(
    url: str,
    settings: HttpSettings,
    *,
    headers: Mapping[str, str] | None = None,
    check: Check = lambda: None,
    validator: Validator | None = None,
) -> HttpSource:
    """The source behind a URL; InvalidRequest for a scheme that is not taken. Touches nothing."""
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise InvalidRequest(
            f"URLs of scheme {scheme[:20]!r} are not taken", "url", f"Give one of: {', '.join(SCHEMES)}"
        )
    return SCHEMES[scheme](url, settings, headers=headers, check=check, validator=validator)
