"""The list of mounts, read from the fields of mountinfo."""

from __future__ import annotations

from pathlib import Path

from ssvm_worker.stores.nfs.mountinfo import Mount, mounts

NFS = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
131 28 0:52 / /mnt/sec rw,relatime shared:69 - nfs4 10.0.0.5:/export/sec rw,vers=4.2,hard,port=20049,addr=10.0.0.5
132 28 0:53 / /mnt/with\040blank\134\011tab rw master:2 propagate_from:3 - nfs fe80::1:/a\040b rw,vers=3
133 28 0:54 /sub /mnt/bind rw - tmpfs 10.0.0.5:/export rw
134 28 0:55 / /mnt/dash rw - - - rw
a line of a later kernel
135 28 0:56 / /mnt/short rw - nfs4
"""


def parsed(tmp_path: Path, text: str) -> list[Mount]:
    """Return the mounts of such a file."""
    place = tmp_path / "mountinfo"
    place.write_text(text)
    return mounts(place)


def test_fields(tmp_path: Path) -> None:
    """Each field has proc(5)'s meaning, for any number of optional fields before the dash."""
    nfs4 = parsed(tmp_path, NFS)[1]
    assert (nfs4.id, nfs4.device, nfs4.root, nfs4.point) == (131, (0, 52), "/", "/mnt/sec")
    assert (nfs4.fstype, nfs4.source) == ("nfs4", "10.0.0.5:/export/sec")
    assert nfs4.options["vers"] == "4.2"
    assert nfs4.options["hard"] == ""


def test_escapes(tmp_path: Path) -> None:
    """Blanks, tabs and backslashes are unescaped."""
    nfs3 = parsed(tmp_path, NFS)[2]
    assert (nfs3.point, nfs3.source) == ("/mnt/with blank\\\ttab", "fe80::1:/a b")


def test_odd_lines(tmp_path: Path) -> None:
    """A malformed line is skipped, and the others count."""
    assert [each.id for each in parsed(tmp_path, NFS)] == [22, 131, 132, 133, 134]


def test_this_machine() -> None:
    """The root of this machine is mounted."""
    assert "/" in {each.point for each in mounts()}
