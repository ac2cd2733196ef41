"""Record regularly how many bytes of an object are durable. A later attempt resumes from the recorded byte.

The bytes that a dead process wrote are in the file. After a crash of the host they may be missing, even if the file is
long enough. So a later attempt uses only the bytes that were durable when the draft manifest recorded them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ssvm_worker.errors import WorkerError
from ssvm_worker.streaming.interfaces import Check, Sink

_log = logging.getLogger("ssvm.journal")
#: Seconds between two records. The first pauses are short, because most transfers are short. Each pause doubles.
_FIRST_S, _LONGEST_S = 0.5, 10.0
#: Seconds that a thread which hangs in a store gets to end after the transfer has failed.
_JOIN_S = 1.0
#: Seconds between two calls of *check*.
_POLL_S = 0.25


class ResumeNote:
    """Thread that records the durable bytes of one transfer to *sink* while the block runs.

    *record* writes the number of durable bytes to the draft manifest. Leave the block before the draft is deleted. If
    the transfer fails and the sink is suspended, the last record counts all bytes that the sink keeps.
    """

    def __init__(self, sink: Sink, record: Callable[[int], None], check: Check = lambda: None) -> None:
        """Prepare the thread. *check* is called while leaving the block waits for the thread."""
        self._sink = sink
        self._record = record
        self._check = check
        self._recorded = sink.offset
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def __enter__(self) -> ResumeNote:
        self._thread.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self._ended.set()
        if failed:
            self._thread.join(_JOIN_S)
            if not self._thread.is_alive():
                self._sync(last=True)
            return
        while self._thread.is_alive():  # a record that is being written must end before the draft is deleted
            self._thread.join(_POLL_S)
            self._check()

    def _run(self) -> None:
        pause = _FIRST_S
        while not self._ended.wait(pause) and self._sync():
            pause = min(2 * pause, _LONGEST_S)

    def _sync(self, *, last: bool = False) -> bool:
        """Record the durable bytes. Return whether to continue. An error of the store stops the transfer itself."""
        try:
            durable = self._sink.sync()
            if self._ended.is_set() and not last:
                return False
            if durable > self._recorded:
                self._record(durable)
                self._recorded = durable
        except WorkerError as error:
            _log.info("%s: cannot record how many bytes are durable: %s", self._sink.key, error)
            return False
        return True
