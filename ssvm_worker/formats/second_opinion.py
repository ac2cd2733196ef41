"""Check the image a second time with OpenStack's format inspectors (oslo.utils).

They know formats and attacks that the worker's own rules may not know. The own rules know some that oslo.utils does not
know: it takes a NUL-padded VMDK descriptor for raw. A finding of either counts.

The inspectors get two pieces, the head and the tail, because some of them answer differently for other chunk sizes. All
their bytes are in the head, except those for the check of a VMDK's footer.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

from ssvm_worker.errors import UnsafeImage

# The package of the inspectors also imports their parser of qemu-img's output, which compiles 250 patterns for it. That
# takes 30 ms at the first image of each process, and nothing here uses it. So the package is not executed.
if "oslo_utils.imageutils" not in sys.modules and (_package := importlib.util.find_spec("oslo_utils.imageutils")):
    sys.modules[_package.name] = importlib.util.module_from_spec(_package)

from oslo_utils.imageutils import format_inspector

#: All inspectors except raw, which matches any bytes, and GPT, whose table cannot name anything outside the disk.
_INSPECTORS = tuple(each for name, each in format_inspector.ALL_FORMATS.items() if name not in ("raw", "gpt"))
# Their findings become errors of the worker. A hostile image must not write to the log too.
format_inspector.LOG.setLevel(logging.CRITICAL)


class SecondOpinion:
    """Findings of oslo.utils about one image."""

    def __init__(self, head: bytes) -> None:
        self._inspectors = [each() for each in _INSPECTORS]
        self._feed(head)
        self._inspectors = [each for each in self._inspectors if _matches(each)]

    def _feed(self, piece: bytes) -> None:
        for inspector in list(self._inspectors):
            try:
                inspector.eat_chunk(piece)
            except Exception:  # noqa: BLE001 - as their own wrapper does: an exception means another format
                self._inspectors.remove(inspector)

    def formats(self) -> set[str]:
        """Return the names of the formats found in the head."""
        return {str(each) for each in self._inspectors}

    def check(self, tail: bytes, where: str) -> None:
        """Raise UnsafeImage if a safety check fails. *tail*: the bytes behind the head, or the last of them."""
        self._feed(tail)
        for inspector in self._inspectors:
            inspector.finish()
            if inspector.complete:
                _check(inspector, where)


def _matches(inspector: format_inspector.FileInspector) -> bool:
    try:
        return bool(inspector.format_match)
    except AttributeError:  # their bug for text that is not a VMDK descriptor: there is no `vmdktype`
        return False


def _check(inspector: format_inspector.FileInspector, where: str) -> None:
    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in error.failures.items())
        raise UnsafeImage(
            f"The {inspector} is not safe: {reasons}", where, "Convert it to a new file: qemu-img convert"
        ) from error
