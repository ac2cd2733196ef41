"""OpenStack's inspectors (oslo.utils), used as in Glance, and the worker's.

docs/reference/formats.md explains the differences.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.edits import edited
from ssvm_worker.errors import ImageError
from ssvm_worker.formats import Inspection
from tests.images import qcow2, vhd_dynamic, vhd_fixed
from tests.neighbours import ROOT
from tests.unit.formats.test_formats import SEEDS
from tests.unit.jobs.download.test_checklist import ROWS

DOCS = (ROOT / "docs/reference/formats.md").read_text()
#: The acceptance list's images, without archives. Rows about the requested format are left out.
IMAGES = {row: data for row, (data, _, asked) in ROWS.items() if int(row.split()[0]) < 15 and asked == "auto"}
#: Images with differences that no row has.
MORE = {
    "a wrong checksum": vhd_dynamic(checksum=1),
    "half a sector": b"\xff" * 700,
    "an error page": b"<html>" + bytes(1018),
    "two formats": vhd_fixed(qcow2()),
}
GOOD: dict[str | int, bytes] = dict(enumerate(SEEDS))

#: The error of one inspector when the other accepts the image, and the explanation in docs/reference/formats.md.
BROKEN = "headers and tables that contradict themselves"
SHORT = "images shorter than they say themselves"
IMPOSSIBLE = "encrypted qcow2, the corrupt bit, impossible sizes"
OURS = {
    r"cut short": SHORT,
    r"is encrypted|marked as corrupt": IMPOSSIBLE,
    r"The qcow2 has (clusters|a virtual size|a refcount|its|\d+ snapshots)": IMPOSSIBLE,
    r"only a descriptor|not ASCII": "VMDK descriptors padded with NULs, or not in ASCII",
    r"VMDK's createType": "a VMDK with two createTypes",
    r"delta disk|differencing disk": "VMDK delta disks; differencing VHD and VHDX",
    r"whole sectors|HTML|sent text|image is empty": "files without whole sectors, HTML, text",
    r"which is not supported": "COWD, SE sparse, Parallels, VMA, LUKS 2, BitLocker, archives",
    r"at once": "a fixed VHD's footer behind another format",
    r"^CorruptImage|unknown region|in an unknown way|names a backing file|VMDK (describes|has)": BROKEN,
}
THEIRS = {
    r"gpt.*(MBR|GPT|partition|PTE)": "GPT and MBR oddities are *taken*",
    r"gpt, iso": "isohybrid ISO is *taken*",
}


def ours(image: bytes) -> str:
    """Return why the worker refuses an image, or nothing."""
    inspection = Inspection("auto")
    try:
        inspection(image)
        inspection.finish()
    except ImageError as error:
        return f"{type(error).__name__}: {error.what}"
    return ""


def theirs(image: bytes) -> str:
    """Return why Glance would refuse it.

    Nothing: one format is found, or an ISO with a partition table, and it is safe.
    """
    from oslo_utils.imageutils import format_inspector  # a slow import, and only one process runs these tests

    wrapper = format_inspector.InspectWrapper(_File(image))
    while wrapper.read(1 << 20):
        pass
    wrapper.close()
    found = {str(each): each for each in wrapper.formats or []}
    names = ", ".join(sorted(found))
    try:
        for inspector in found.values():
            inspector.safety_check()
    except format_inspector.SafetyCheckFailed as error:
        return f"{names}: {[str(each) for each in error.failures.values()]}"
    except format_inspector.ImageFormatError as error:
        return f"{names}: {error}"
    return "" if len(found) == 1 or names == "gpt, iso" else f"{names or 'nothing'} found"


class _File:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def close(self) -> None:
        pass


def reason(image: bytes) -> str | None:
    """Return the explanation in docs/reference/formats.md of a difference about this image, or None."""
    us, them = ours(image), theirs(image)
    if bool(us) == bool(them):
        return None
    if us and len(image) < 512:
        return SHORT
    for pattern, words in (OURS if us else THEIRS).items():
        if re.search(pattern, us or them):
            return words
    pytest.fail(f"they say {them!r}, we say {us!r}, and nothing says why")


@pytest.mark.parametrize("row", IMAGES | MORE)
def test_the_list(row: str) -> None:
    """For each image of the acceptance list both agree, or a line explains the difference."""
    assert (reason((IMAGES | MORE)[row]) or "") in DOCS


EDITS = st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 63), st.binary(min_size=1, max_size=8)), max_size=3)


@given(name=st.sampled_from([*GOOD, *IMAGES]), edits=EDITS, cut=st.one_of(st.none(), st.integers(0, 0xFFFF)))
@settings(max_examples=200)
def test_mutants(name: str | int, edits: list[tuple[int, int, bytes]], cut: int | None) -> None:
    """The same is true of these images with changed structures or only their start."""
    image = (GOOD | IMAGES)[name]
    script = b"".join(block.to_bytes(2, "little") + bytes([place, len(new) - 1]) + new for block, place, new in edits)
    end = b"" if cut is None else cut.to_bytes(2, "little") + b"\0\xff"
    assert (reason(edited(b"\0" + script + end, [image])) or "") in DOCS


def test_every_reason_is_needed() -> None:
    """Every explanation belongs to a real difference."""
    found = {reason(image) for image in (IMAGES | MORE).values()}
    assert found - {None} == {*OURS.values(), "GPT and MBR oddities are *taken*"}
