"""When each artifact was last read again and what was found: for one process; the ledger keeps the same for all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


def iso(when: float) -> str:
    """Seconds since the epoch as ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


@dataclass(frozen=True)
class ScrubResult:
    """What the last look at an artifact has found."""

    store: str
    #: The artifact's prefix.
    place: str
    #: Seconds since the epoch.
    when: float
    #: Empty of a sound one.
    findings: tuple[str, ...] = ()
    #: Who looked.
    job_id: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON shape."""
        shown = {"store": self.store, "artifact": self.place, "verified": iso(self.when), "job_id": self.job_id}
        return shown | {"findings": list(self.findings)}


class ScrubResults(Protocol):
    """Remembers. Each call raises StoreUnavailable while whoever remembers is away."""

    def note(self, store: str, place: str, findings: Sequence[str], job_id: str) -> None:
        """That artifact was read just now; what was found before is forgotten. It is how far the job has come, too."""

    def reached(self, job_id: str, store: str) -> str:
        """The last place that an attempt of the job has noted there within a week; "" for none."""

    def times(self, store: str, places: Sequence[str]) -> list[float]:
        """When each was last verified, in seconds since the epoch; 0 for never."""

    def findings(self) -> Iterator[ScrubResult]:
        """The verdicts that found something, by store and place."""

    def forget(self, store: str, place: str) -> None:
        """The artifact is gone."""

    def noted(self, store: str, before: float) -> Iterator[str]:
        """Places there whose verdicts are older than that."""


class LocalScrubResults:
    """Remembers as long as the process lives."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], ScrubResult] = {}
        self._reached: dict[tuple[str, str], str] = {}

    def note(self, store: str, place: str, findings: Sequence[str], job_id: str) -> None:
        self._known[store, place] = ScrubResult(store, place, time.time(), tuple(findings), job_id)
        self._reached[job_id, store] = place

    def reached(self, job_id: str, store: str) -> str:
        return self._reached.get((job_id, store), "")

    def times(self, store: str, places: Sequence[str]) -> list[float]:
        known = (self._known.get((store, place)) for place in places)
        return [each.when if each else 0.0 for each in known]

    def findings(self) -> Iterator[ScrubResult]:
        return (self._known[each] for each in sorted(self._known) if self._known[each].findings)

    def forget(self, store: str, place: str) -> None:
        self._known.pop((store, place), None)

    def noted(self, store: str, before: float) -> Iterator[str]:
        known: Iterable[ScrubResult] = tuple(self._known.values())
        return (each.place for each in known if each.store == store and each.when < before)
