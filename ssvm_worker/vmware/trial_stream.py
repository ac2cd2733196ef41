"""Facts about one data stream of a host, for ``ssvm doctor --trial``. Unlike a backup, this reader refuses nothing."""

from __future__ import annotations

import hashlib
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from ssvm_worker.net.http import HttpSession
from ssvm_worker.streaming.interfaces import CHUNK

from .export import ExportLink

_SECTOR = 512
_MARKER = struct.Struct("<QII")
_GRAIN_HEAD = 12
_KINDS = ("end", "table", "directory", "footer", "progress")
_PROGRESS = 4
#: Magic, version, flags, capacity, grain size; and the overhead at offset 64. Source: "Virtual Disk Format 5.0".
_HEADER = struct.Struct("<4sIIQQ")
#: The largest grain that is inflated. A stream with larger grains has no count of zero grains.
_MAX_GRAIN = 1 << 20


class MarkerWalk:
    """Observer of chunks that counts the markers of a streamOptimized VMDK. Memory: one grain."""

    def __init__(self) -> None:
        self.version = 0
        #: Metadata markers by kind, and grains.
        self.kinds: Counter[str] = Counter()
        #: Markers with other bytes than zero in their padding.
        self.dirty = 0
        #: Grains that contain only zeros.
        self.zero_grains = 0
        #: Bytes after the end-of-stream marker.
        self.trailing = 0
        self.is_vmdk = True
        self._held = bytearray()
        self._skip = 0
        self._want = _SECTOR
        self._then: Callable[[bytes], None] = self._on_header

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if not self.is_vmdk:
            return
        if self.ended:
            self.trailing += len(chunk)
            return
        self._held += chunk
        at = 0
        while not self.ended and self.is_vmdk:
            step = min(self._skip, len(self._held) - at)
            self._skip -= step
            at += step
            if self._skip or len(self._held) - at < self._want:
                break
            piece = bytes(self._held[at : at + self._want])
            at += self._want
            self._then(piece)
        del self._held[:at]
        if self.ended:
            self.trailing += len(self._held)
            self._held.clear()

    @property
    def ended(self) -> bool:
        """Return whether the end-of-stream marker has passed."""
        return bool(self.kinds["end"])

    def _on_header(self, sector: bytes) -> None:
        magic, self.version, _, _, _ = _HEADER.unpack_from(sector)
        self.is_vmdk = magic == b"KDMV"
        overhead = int.from_bytes(sector[64:72], "little")
        self._skip, self._then = max(0, overhead - 1) * _SECTOR, self._on_marker

    def _on_marker(self, sector: bytes) -> None:
        value, size, kind = _MARKER.unpack_from(sector)
        if size:
            rest = -(-(_GRAIN_HEAD + size) // _SECTOR) * _SECTOR - _SECTOR
            self.kinds["grain"] += 1
            if size <= _MAX_GRAIN:
                self._want = rest
                self._then = lambda data: self._on_grain((sector + data)[_GRAIN_HEAD : _GRAIN_HEAD + size])
            else:
                self._skip = rest
            return
        self.dirty += any(sector[_MARKER.size + (8 if kind == _PROGRESS else 0) :])  # it has the place in the disk
        self.kinds[_KINDS[kind] if kind < len(_KINDS) else "unknown"] += 1
        self._skip = value * _SECTOR if kind < len(_KINDS) - 1 else 0

    def _on_grain(self, data: bytes) -> None:
        self._want, self._then = _SECTOR, self._on_marker
        inflater = zlib.decompressobj()
        try:
            self.zero_grains += not any(inflater.decompress(data, _MAX_GRAIN))
        except zlib.error:
            self.kinds["broken grain"] += 1


@dataclass
class Download:
    """One GET of a file of a lease, and what came."""

    status: int = 0
    #: How the host marks the end of the body: chunked, length or close.
    body: str = ""
    size: int = 0
    #: "clean", or the class of the exception that ended the body.
    end: str = "clean"
    #: Whether TLS did not announce the end of the connection.
    is_cut: bool = False
    longest_silence_s: float = 0.0
    #: By algorithm, as hex.
    digests: dict[str, str] = field(default_factory=dict)
    walk: MarkerWalk = field(default_factory=MarkerWalk)

    @classmethod
    def of(cls, link: ExportLink, beat: Callable[[], None], headers: dict[str, str], limit: int | None) -> Download:
        """Read a file, at most *limit* bytes. *beat* is called in every wait and for every chunk."""
        it = cls()
        hashes = [hashlib.sha1(usedforsecurity=False), hashlib.sha256()]
        with closing(HttpSession(link.options, beat).exchange("GET", link.web_url, headers)) as answer:
            it.status = answer.status_code
            it.body = "chunked" if answer.raw.chunked else "close" if answer.length is None else "length"
            last = time.monotonic()
            try:
                while (limit is None or it.size < limit) and (chunk := answer.read(CHUNK)):
                    now = time.monotonic()
                    it.longest_silence_s, last = max(it.longest_silence_s, now - last), now
                    it.size += len(chunk)
                    for each in hashes:
                        each.update(chunk)
                    it.walk(chunk)
                    beat()
            except (OSError, HTTPException) as error:
                it.end, it.is_cut = type(error).__name__, isinstance(error, OSError)
        it.digests = {each.name: each.hexdigest() for each in hashes}
        return it

    @property
    def body_end(self) -> str:
        """Return how a complete stream ended, in the words of the simulator, or "" for a last chunk or a length."""
        if self.end != "clean" and not self.walk.ended:
            return ""
        how = "close" if self.body == "close" else "" if self.end == "clean" else "no_last_chunk"
        return how + ("_cut" if how and self.is_cut else "")

    def facts(self) -> dict[str, Any]:
        """Return the facts without any digest."""
        facts: dict[str, Any] = {"status": self.status, "body": self.body, "bytes": self.size, "end": self.end}
        facts["longest_silence_s"] = round(self.longest_silence_s, 1)
        walk = self.walk
        if self.status == 200 and walk.is_vmdk and self.size:
            facts["vmdk_version"], facts["markers"] = walk.version, dict(sorted(walk.kinds.items()))
            facts["dirty_markers"], facts["zero_grains"] = walk.dirty, walk.zero_grains
            facts["trailing_bytes"] = walk.trailing
        return facts
