"""The results of scrubs: when each artifact was last verified, and what was found. Here: in memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


def iso(seconds: float) -> str:
    """Return seconds since the epoch as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@dataclass(frozen=True)
class ScrubResult:
    """The result of the last verification of an artifact."""

    store: str
    #: The artifact's prefix.
    place: str
    #: Seconds since the epoch.
    when: float
    #: Empty for an intact artifact.
    findings: tuple[str, ...] = ()
    #: The job that verified the artifact.
    job_id: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the public JSON."""
        shown = {"store": self.store, "artifact": self.place, "verified": iso(self.when), "job_id": self.job_id}
        return shown | {"findings": list(self.findings)}


class ScrubResults(Protocol):
    """The stored results of scrubs. Each method raises StoreUnavailable while their broker is away."""

    def note(self, store: str, place: str, findings: Sequence[str], job_id: str) -> None:
        """Store the result of a verification that has just ended, and replace the last one.

        The artifact is also stored as the last one that the job has reached.
        """

    def reached(self, job_id: str, store: str) -> str:
        """Return the last artifact on that store that the job has verified within a week; "" for none."""

    def times(self, store: str, places: Sequence[str]) -> list[float]:
        """Return when each artifact was last verified, in seconds since the epoch; 0 for never."""

    def findings(self) -> Iterator[ScrubResult]:
        """Yield the results with findings, by store and place."""

    def forget(self, store: str, place: str) -> None:
        """Delete the result of a deleted artifact."""

    def noted(self, store: str, before: float) -> Iterator[str]:
        """Yield the artifacts on that store whose results are older than *before*."""


class LocalScrubResults:
    """Results in the memory of this process."""

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
