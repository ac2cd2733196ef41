"""Convert a downloaded image to another format before it is stored, in a scratch folder of this worker.

The image is downloaded to the folder and inspected as usual. Then qemu-img checks and converts it. The result is
streamed to the stores and inspected again.
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
    """The conversion of one image in a scratch folder."""

    def __init__(self, folder: Path, to: str, attempt: Attempt, location: str) -> None:
        self.to = to
        self._folder = folder
        self._store = FileStore("scratch", folder)
        self._attempt = attempt
        self._location = location

    def sink(self, size: int | None) -> Sink:
        """Return the sink of the downloaded image."""
        return self._store.writer("image", size, owner=self._attempt.owner)

    def run(self, image: ImageInfo) -> Source:
        """Return the converted image. An image that has the requested format already is returned as it is."""
        if image.format == self.to and image.details.get("create_type") != "monolithicSparse":
            return self._store.reader("image")
        refuse_source(image.format, self._location)
        qemu_img = QemuImg(self._folder, image.virtual_size, self._attempt.check, self._location)
        progress, path = self._attempt.progress, self._folder / "image"
        progress.start("checking")
        qemu_img.inspect(path, image.format)
        progress.start("converting", image.virtual_size)
        qemu_img.convert(path, image.format, self.to, self._folder / "converted", progress.advance)
        path.unlink()
        return self._store.reader("converted")


@contextlib.contextmanager
def converting(to: str, attempt: Attempt, location: str) -> Iterator[Conversion]:
    """Yield a conversion in a new scratch folder, and remove the folder after the block.

    Raises ConfigError if the settings have no scratch directory.
    """
    parent = attempt.settings.download.scratch_dir
    if not parent:
        remedy = "Set it to a directory with space for the image before and after the conversion"
        raise ConfigError("This worker does not convert images", "download.scratch_dir", remedy)
    tool("qemu-img")
    with scratch_folder(parent, _PREFIX) as folder:
        yield Conversion(folder, to, attempt, location)
