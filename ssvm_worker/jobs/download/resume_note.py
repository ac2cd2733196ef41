"""Notes from time to time how much of an object would outlive this host: from there another attempt goes on.

What a dead process has written is there; what a dead host has written need not be, even where the file is long enough.
So bytes are taken up again only as far as they were on the disk for good when the journal said so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from ssvm_worker.errors import WorkerError
from ssvm_worker.streaming.interfaces import Check, Sink

_log = logging.getLogger("ssvm.journal")
#: Seconds between two notes: the first ones come soon, as most transfers are short, and then one every ten seconds.
_FIRST_S, _LONGEST_S = 0.5, 10.0
#: Seconds that a thread which hangs in a store gets to end, once the transfer has failed.
_PATIENCE_S = 1.0
#: Seconds between two looks at *check*.
_TICK_S = 0.25


class ResumeNote:
    """Around one transfer to *sink*; *note* keeps the bytes that it is told, in the draft.

    Leave it before anything is written that ends the draft. If the transfer has failed and the sink was suspended, the
    last note tells all that it has kept.
    """

    def __init__(self, sink: Sink, note: Callable[[int], None], check: Check = lambda: None) -> None:
        """*check* is heard while leaving waits for the thread."""
        self._sink = sink
        self._note = note
        self._check = check
        self._noted = sink.offset
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def __enter__(self) -> ResumeNote:
        self._thread.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._ended.set()
        if failed:
            self._thread.join(_PATIENCE_S)
            if not self._thread.is_alive():
                self._write(last=True)
            return
        while self._thread.is_alive():  # a note that it has begun must not come behind the end of the draft
            self._thread.join(_TICK_S)
            self._check()

    def _run(self) -> None:
        for pause in _pauses():
            if self._ended.wait(pause) or not self._write():
                return

    def _write(self, *, last: bool = False) -> bool:
        """Whether to go on; the transfer itself meets whatever is wrong with the store."""
        try:
            settled = self._sink.sync()
            if self._ended.is_set() and not last:
                return False
            if settled > self._noted:
                self._note(settled)
                self._noted = settled
        except WorkerError as error:
            _log.info("%s: not noted how far it has come: %s", self._sink.key, error)
            return False
        return True


def _pauses() -> Iterator[float]:
    pause = _FIRST_S
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_S)
