"""A file system that never answers: ``python -m tests.servers.hung_mount DIRECTORY COMMAND…`` mounts it there.

The command runs in a separate mount namespace, so other programs do not see the mount. Needs root and /dev/fuse.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_FUSE_INIT = 26


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _answer_only_the_first(device: int) -> None:
    """Answer the kernel's greeting, then read all requests and answer none."""
    while True:
        _, opcode, unique = struct.unpack_from("<IIQ", os.read(device, 1 << 20))
        if opcode == _FUSE_INIT:
            body = struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 12, 65536, 1, 0, 0, 0)
            os.write(device, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)


def _main(directory: str, command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_CLONE_NEWNS))
    _checked(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    _checked(libc.mount(b"hung", directory.encode(), b"fuse", 0, options.encode()))
    threading.Thread(target=_answer_only_the_first, args=(device,), daemon=True).start()
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
