"""Turns a downloaded image into another format on its way to the stores, in a scratch folder of this worker.

The image is written there as it arrives and judged as ever; only then it is checked and converted. What comes out is
streamed to the stores, and judged again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ssvm_worker.errors import ConfigError
from ssvm_worker.formats import ImageInfo
from ssvm_worker.formats.qemu_img import QemuImg, refuse_source, tool
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.scratch import scratch_folder
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Sink, Source

_PREFIX = "ssvm-convert-"


class Conversion:
    """One image on its way through the scratch folder."""

    def __init__(self, folder: Path, to: str, attempt: Attempt, where: str) -> None:
        self.to = to
        self._folder = folder
        self._store = FileStore("scratch", folder)
        self._attempt = attempt
        self._where = where

    def sink(self, size: int | None) -> Sink:
        """Takes the image as it arrives."""
        return self._store.writer("image", size, owner=self._attempt.owner)

    def run(self, info: ImageInfo) -> Source:
        """The converted image; of one that is in that format already, the image itself."""
        if info.format == self.to and info.details.get("create_type") != "monolithicSparse":
            return self._store.reader("image")
        refuse_source(info.format, self._where)
        qemu_img = QemuImg(self._folder, info.virtual_size, self._attempt.check, self._where)
        progress, image = self._attempt.progress, self._folder / "image"
        progress.start("checking")
        qemu_img.inspect(image, info.format)
        progress.start("converting", info.virtual_size)
        qemu_img.convert(image, info.format, self.to, self._folder / "converted", progress.advance)
        image.unlink()
        return self._store.reader("converted")


@contextlib.contextmanager
def converting(to: str, attempt: Attempt, where: str) -> Iterator[Conversion]:
    """A conversion in a folder of its own, which is removed at the end; what dead workers have left goes first."""
    parent = attempt.limits.scratch_dir
    if not parent:
        raise ConfigError(
            "This worker does not convert images", "download.scratch_dir", "Set it to a directory with room for two"
        )
    tool("qemu-img")
    with scratch_folder(parent, _PREFIX) as folder:
        yield Conversion(folder, to, attempt, where)
