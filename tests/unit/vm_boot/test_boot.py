"""verify with boot: a restored copy of a backup runs isolated in QEMU, and its screen is kept."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled, ConfigError, CorruptImage, InvalidRequest
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.scratch import scratch_folder
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.jobs.verify.boot import boot_check
from ssvm_worker.operations.doctor import examine
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.units import MiB
from ssvm_worker.vm_boot.boot import try_accelerator
from ssvm_worker.vm_boot.command_line import BootMachine, Drive, command
from ssvm_worker.vm_boot.screenshot import Picture, read_ppm
from tests import grain_bench
from tests.attempts import attempt
from tests.backups import BACKUP, content, store_backup
from tests.grain_bench import OWNER
from tests.neighbours import missing

REQUEST = {"kind": "backup", "account": "acme", "volume": "vol1", "id": "b1", "boot": True}
BOOTABLE = Path("/usr/lib/grub-rescue/grub-rescue-usb.img")
FAST = {"memory": 256 * MiB, "seconds": 100.0, "still_s": 3.0}


@pytest.fixture
def grub() -> bytes:
    """Return a disk from which GRUB starts and shows its prompt."""
    if shutil.which("qemu-system-x86_64") is None:
        missing("qemu-system-x86_64", "apt-get install qemu-system-x86")
    if not BOOTABLE.exists():
        missing(str(BOOTABLE), "apt-get install grub-rescue-pc")
    return BOOTABLE.read_bytes()


def trying(store: Store, folder: Path, **fields: Any) -> Attempt:
    """Return an attempt whose guests are in that folder."""
    return attempt(store, settings={"boot": {"dir": folder / "boot", **FAST}}, **fields)


def run(it: Attempt) -> dict[str, Any]:
    boot: dict[str, Any] = verify.run(parse_request(verify.Request, REQUEST, "verify"), it)["boot"]
    return boot


def pixels_of(png: bytes) -> tuple[int, int, bytes]:
    """Return width, height and pixels of a PNG without filters, and check that each chunk is complete."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        size, kind = struct.unpack_from(">I4s", png, at)
        data = png[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", png, at + 8 + size)[0] == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines, row = zlib.decompress(chunks[b"IDAT"]), 3 * width + 1
    return width, height, b"".join(lines[at + 1 : at + row] for at in range(0, len(lines), row))


@pytest.mark.e2e
def test_boots(grub: bytes, tmp_path: Path) -> None:
    """A VM with two disks boots from the first; only the screenshot of its screen is left."""
    store = MemoryStore("primary")
    store_backup(store, grub, content(1 * MiB))

    seen = run(trying(store, tmp_path))

    picture = Path(seen["screenshot"])
    width, height, pixels = pixels_of(picture.read_bytes())
    assert (seen["screen"], seen["width"], seen["height"], seen["disks"]) == ("still", width, height, 2)
    assert not Picture(width, height, pixels).is_blank
    assert [each for each in (tmp_path / "boot").rglob("*") if each.is_file()] == [picture]


@pytest.mark.e2e
def test_boots_from_grains(grub: bytes, tmp_path: Path) -> None:
    """An incremental backup boots too."""
    store = MemoryStore("primary")
    manifest = grain_bench.back_up(store, "b1", grub)
    it = trying(store, tmp_path)
    request = parse_request(verify.Request, REQUEST, "verify")
    assert manifest.artifact == request.artifact
    assert boot_check(it, store, request.artifact)["screen"] == "still"


@pytest.mark.e2e
def test_nothing_to_boot(grub: bytes, tmp_path: Path) -> None:
    """A disk without a boot sector is recognised, and the error names the screenshot."""
    store = MemoryStore("primary")
    store_backup(store, content(len(grub) // 2))
    with pytest.raises(CorruptImage, match="nothing to boot") as raised:
        run(trying(store, tmp_path))
    assert str(tmp_path / "boot" / f"{BACKUP.prefix}.png") in raised.value.remedy


@pytest.mark.e2e
def test_cancel(grub: bytes, tmp_path: Path) -> None:
    """A cancel ends the guest and leaves nothing."""
    store = MemoryStore("primary")
    store_backup(store, grub)
    it = trying(store, tmp_path)
    it.stop_reason = lambda: "user" if it.progress.stage == "booting" and list(tmp_path.rglob("screen.ppm")) else None
    with pytest.raises(Cancelled):
        run(it)
    assert [each for each in (tmp_path / "boot").rglob("*")] == []
    assert not is_running(tmp_path)


#: A QEMU on a machine with a broken /dev/kvm: it aborts before the guest runs.
BROKEN_KVM = """#!/bin/sh
for word; do
    [ "$word" = kvm ] && { echo "Assertion 'ret == cpu->kvm_msr_buf->nmsrs' failed." >&2; kill -ABRT $$; }
done
exec QEMU "$@"
"""


@pytest.fixture
def broken_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make QEMU abort as soon as it uses KVM."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        missing("qemu-system-x86_64", "apt-get install qemu-system-x86")
    script = tmp_path / "bin/qemu-system-x86_64"
    script.parent.mkdir()
    script.write_text(BROKEN_KVM.replace("QEMU", qemu))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


@pytest.mark.e2e
def test_broken_kvm(grub: bytes, broken_kvm: None, tmp_path: Path) -> None:
    """If QEMU aborts under KVM, the guest boots under TCG, and the result says why."""
    store = MemoryStore("primary")
    store_backup(store, grub)
    seen = run(trying(store, tmp_path))
    assert (seen["screen"], seen["accelerator"]) == ("still", "tcg")
    assert "kvm_msr_buf" in seen["kvm_failure"]


@pytest.mark.parametrize("wanted", ["auto", "kvm", "tcg"])
def test_accelerators(broken_kvm: None, wanted: str) -> None:
    """TCG needs no KVM; auto falls back to TCG; kvm alone fails with QEMU's own words."""
    if wanted == "kvm":
        with pytest.raises(ConfigError, match=r"kvm_msr_buf.*Set boot.accelerator to tcg"):
            try_accelerator(wanted)
    else:
        seen = try_accelerator(wanted)
        assert (seen.kvm, "kvm_msr_buf" in seen.kvm_failure) == (False, wanted == "auto")


@pytest.mark.parametrize("boot", [{}, {"still_s": 30}])
def test_doctor_starts_qemu(broken_kvm: None, boot: dict[str, Any]) -> None:
    """The doctor starts QEMU to test KVM. That KVM does not work is a warning only with settings for boots."""
    settings = Settings.model_validate({"boot": boot})
    [finding] = [each for each in examine(settings) if each.check == "verify --boot"]
    assert (finding.ok, finding.warning) == (True, bool(boot))
    assert finding.detail.endswith("with TCG, slow: KVM does not work here")


#: One boot in its own process, with a directory as its store.
WORKER = """
import pathlib, sys
from ssvm_worker.jobs.verify.boot import boot_check
from ssvm_worker.stores.file.store import FileStore
from tests.attempts import attempt
from tests.backups import BACKUP
folder = pathlib.Path(sys.argv[1])
store = FileStore("primary", folder / "store")
boot = {"dir": folder / "boot", "memory": 256 << 20, "seconds": 300, "still_s": 300}
it = attempt(store, settings={"boot": boot})
boot_check(it, store, BACKUP)
"""


@pytest.mark.e2e
def test_worker_killed(grub: bytes, tmp_path: Path) -> None:
    """If the worker is killed, its guest ends too, and the next boot deletes its files."""
    (tmp_path / "store").mkdir()
    store_backup(FileStore("primary", tmp_path / "store"), grub)
    with subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)]) as worker:
        while not list(tmp_path.rglob("screen.ppm")):
            assert worker.poll() is None
            time.sleep(0.1)
        assert is_running(tmp_path)
        worker.kill()
    while is_running(tmp_path):
        time.sleep(0.1)
    (left,) = (tmp_path / "boot").iterdir()
    os.utime(left, (0, 0))
    with scratch_folder(tmp_path / "boot", "ssvm-boot-"):
        pass
    assert not list((tmp_path / "boot").iterdir())


def is_running(folder: Path) -> bool:
    """Return whether a guest runs in that folder."""
    shown = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    return any(line.startswith("/") and "qemu-system" in line and str(folder) in line for line in shown.splitlines())


def test_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QEMU the error says what to install, before any restore."""
    monkeypatch.setenv("PATH", str(tmp_path))
    store = MemoryStore("primary")
    store_backup(store, content(1 * MiB))
    with pytest.raises(ConfigError, match="Install qemu-system-x86"):
        run(trying(store, tmp_path))
    assert not (tmp_path / "boot").exists()


def test_damaged(tmp_path: Path) -> None:
    """A damaged backup is not booted."""
    store = MemoryStore("primary")
    store_backup(store, content(1 * MiB))
    put_bytes(store, BACKUP.key("b1-disk0.vmdk"), bytes(1000), OWNER)
    with pytest.raises(CorruptImage, match="damaged"):
        run(trying(store, tmp_path))
    assert not (tmp_path / "boot").exists()


def test_cut_off(grub: bytes, tmp_path: Path) -> None:
    """QEMU has no network, no default devices, no way to start programs, limits, and explicit disk formats."""
    assert grub
    words = command(BootMachine([Drive(tmp_path / "a,b")], 64 * MiB), 7, tmp_path / "log", 100)
    line = " ".join(words)
    for part in ("-nic none", "-nodefaults", "-no-user-config", "-snapshot", "--cpu=100", "--pdeathsig KILL"):
        assert part in line
    assert "spawn=deny" in words[words.index("-sandbox") + 1]
    drives = [words[at + 1] for at, word in enumerate(words) if word == "-drive"]
    assert drives == [f"if=none,id=d0,format=qcow2,file={tmp_path}/a,,b"]


@pytest.mark.parametrize("fields", [REQUEST | {"kind": "template"}, {"all": True, "boot": True}])
def test_only_backups(fields: dict[str, Any]) -> None:
    """Only one backup at a time is booted."""
    with pytest.raises(InvalidRequest, match="boot requires account, volume and id"):
        parse_request(verify.Request, fields, "verify")


def screen(*places: int, width: int = 720, height: int = 400) -> Picture:
    """Return a black picture with white pixels at those positions."""
    pixels = bytearray(3 * width * height)
    for place in places:
        pixels[3 * place : 3 * place + 3] = b"\xff" * 3
    return Picture(width, height, bytes(pixels))


def test_pictures() -> None:
    """A blinking cursor is neither a change nor a picture; a word or another size is both."""
    cursor, word = screen(*range(18)), screen(*range(400))
    assert screen().is_blank
    assert cursor.is_blank
    assert not word.is_blank
    assert cursor.is_like(screen())
    assert not word.is_like(screen())
    assert not screen().is_like(screen(width=640))
    assert pixels_of(word.png()) == (720, 400, word.pixels)


@pytest.mark.parametrize("data", [b"", b"P5 1 1 255 a", b"P6\n2 2\n255\nabc"])
def test_no_picture(data: bytes) -> None:
    """An invalid picture is reported, and not shown."""
    with pytest.raises(ValueError, match="PPM"):
        read_ppm(data)
    assert read_ppm(b"P6\n1 1\n255\nabc") == Picture(1, 1, b"abc")
