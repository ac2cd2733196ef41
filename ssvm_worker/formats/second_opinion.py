"""The second judge: OpenStack's format inspectors (oslo.utils), fed with the head and the tail of the same image.

They know formats and attacks that we may not, and we know some that they do not (they take a NUL-padded VMDK descriptor
for raw). What either finds counts. They are fed two pieces, whatever the chunks were: some of them answer differently
for different chunkings, and every inspector but the VMDK's footer check has its bytes within the head.
"""

from __future__ import annotations

import logging

from oslo_utils.imageutils import format_inspector

from ssvm_worker.errors import UnsafeImage

#: Every inspector but raw, which matches anything, and GPT, whose table can name nothing outside the disk (see raw).
_INSPECTORS = tuple(each for name, each in format_inspector.ALL_FORMATS.items() if name not in ("raw", "gpt"))
# What they find is in our errors; a hostile image must not write into the log as well.
format_inspector.LOG.setLevel(logging.CRITICAL)


class SecondOpinion:
    """What oslo.utils thinks of one image."""

    def __init__(self, head: bytes) -> None:
        self._inspectors = [each() for each in _INSPECTORS]
        self._feed(head)
        self._inspectors = [each for each in self._inspectors if _matches(each)]

    def _feed(self, piece: bytes) -> None:
        for inspector in list(self._inspectors):
            try:
                inspector.eat_chunk(piece)
            except Exception:  # noqa: BLE001 - as their own wrapper does: whatever it raises, it is not this format
                self._inspectors.remove(inspector)

    def formats(self) -> set[str]:
        """The names of the formats found in the head."""
        return {str(each) for each in self._inspectors}

    def check(self, tail: bytes, where: str) -> None:
        """Raise UnsafeImage if one of their safety checks fails; *tail* is what follows the head, or its last bytes."""
        self._feed(tail)
        for inspector in self._inspectors:
            inspector.finish()
            if inspector.complete:
                _check(inspector, where)


def _matches(inspector: format_inspector.FileInspector) -> bool:
    try:
        return bool(inspector.format_match)
    except AttributeError:  # theirs, for text that is no VMDK descriptor: it has no `vmdktype`
        return False


def _check(inspector: format_inspector.FileInspector, where: str) -> None:
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in error.failures.items())
        raise UnsafeImage(
            f"The {inspector} is not safe: {reasons}", where, "Convert it into a new file with qemu-img convert"
        ) from error
