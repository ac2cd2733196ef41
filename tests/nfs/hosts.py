"""The hosts of the VM: each is a process in its own namespaces that runs given functions. The tests run on alpha."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_LIBC = ctypes.CDLL(None, use_errno=True)
#: sched.h
_NEWNS, _NEWUTS = 0x00020000, 0x04000000


class Host:
    """One host; its mounts end when it closes."""

    def __init__(self, enter: Callable[[], None]) -> None:
        # Forked, not spawned, because an interpreter's start takes seconds here.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=enter)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function there, and return its result or raise its exception. Module state is kept between calls."""
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def on_server() -> Host:
    """Return the VM itself as a host."""
    return Host(_enter_server)


def on_client(name: str) -> Host:
    """Return ``beta`` or ``gamma``, a client beside alpha with its own addresses, connections and caches."""
    return Host(partial(_enter_client, name))


def command(*words: str) -> str:
    """Run a command, and return its output."""
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def _enter_server() -> None:
    for kind in ("net", "uts", "mnt"):
        _enter(f"/proc/1/ns/{kind}")


def _enter_client(name: str) -> None:
    # The server distinguishes clients by this name.
    _must(_LIBC.unshare(_NEWNS | _NEWUTS))
    socket.sethostname(name)
    _enter(f"/run/netns/{name}")
    command("mount", "--make-rprivate", "/")


def _enter(namespace: str) -> None:
    handle = os.open(namespace, os.O_RDONLY)
    _must(_LIBC.setns(handle, 0))
    os.close(handle)


def _must(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
