"""One image through the one pass: hashed, inspected and stored, and nothing committed before it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.manifest import Entry
from ssvm_worker.formats import ImageInfo, Inspection
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.streaming.fan_out import StreamResult, store_stream
from ssvm_worker.streaming.interfaces import Observer, Sink


def _no_more() -> None:
    """Nothing else is to be true of it."""


def _nothing(_: BaseException) -> bool:
    """A failed pass leaves nothing."""
    return False


@dataclass(frozen=True)
class ImagePass:
    """How one image is judged."""

    attempt: Attempt
    #: auto, or what it must be.
    wanted: str
    #: How errors name it.
    where: str
    hasher: Hasher
    #: Raises if the bytes are not the ones expected; called when all have come.
    verify: Callable[[], None] = _no_more
    #: Whether its bytes count as the account's; those of a scratch file do not.
    counted: bool = True
    #: Whether a part that this error leaves behind will be taken up again.
    keep: Callable[[BaseException], bool] = _nothing

    def store(self, chunks: Iterator[bytes], sinks: Mapping[str, Sink]) -> tuple[ImageInfo, StreamResult]:
        """Take all *chunks* to all *sinks*; what ``store_stream``, ``verify`` and the inspectors raise."""
        inspection = Inspection(self.wanted, self.attempt.limits.max_virtual_size, self.where)
        images: list[ImageInfo] = []

        def verify() -> None:
            self.verify()
            images.append(inspection.finish())
            self.attempt.confirm()

        observers: list[Observer] = [self.hasher, inspection]
        if self.counted:
            observers.append(self.attempt.held.took)
        check, min_rate = self.attempt.check, self.attempt.limits.min_store_rate
        stored = store_stream(chunks, sinks, observers, verify=verify, check=check, keep=self.keep, min_rate=min_rate)
        return images[0], stored

    def entry(self, name: str, image: ImageInfo, role: str = "image") -> Entry:
        """What the manifest says of it."""
        facts = {"format": image.format, "virtual_size": image.virtual_size, **image.details}
        return Entry(name, self.hasher.size, str(self.hasher.digest()), role, facts)
