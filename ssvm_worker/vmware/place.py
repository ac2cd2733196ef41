"""Where a new VM goes, as a request says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class VmTarget:
    """What a request says. A name may be a managed object id as well."""

    #: Of the new VM.
    name: str
    folder: str | None = None
    pool: str | None = None
    datastore: str | None = None
    #: The VM's network where it came from, to the network here.
    networks: Mapping[str, str] = field(default_factory=dict)
