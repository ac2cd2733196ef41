"""The health of the image stores, looked at now and then by a process that may hang and be killed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from typing import Any

from ssvm_worker.errors import StoreUnavailable

_LOG = logging.getLogger("ssvm.stores")
#: Seconds between two looks at the stores, and for one of them: it may hang, and is killed then.
_STORES_EVERY_S, _STORES_LIMIT_S = 60.0, 30.0
_FIELDS = {"name", "state"}


def look_at_stores(settings_file: str | None) -> list[dict[str, Any]]:
    """The rows of ``ssvm stores --json``, by a process of its own, which is killed if a store makes it hang.

    Raises StoreUnavailable if there is no result, as where the process cannot start.
    """
    command = [sys.executable, "-P", "-m", "ssvm_worker", "stores", "--json"]
    command += ["--config", settings_file] if settings_file else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=_STORES_LIMIT_S)
        rows = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise StoreUnavailable(f"The stores cannot be examined: {error}", "", "Run `ssvm stores`") from error
    if not isinstance(rows, list) or not all(isinstance(each, dict) and each.keys() >= _FIELDS for each in rows):
        raise StoreUnavailable("The stores cannot be examined", "", "Run `ssvm stores`")
    return rows


class StoreWatch:
    """Looks at the stores now and then, in a thread, so that no scrape waits for them."""

    def __init__(self, settings_file: str | None) -> None:
        self._file = settings_file
        self._rows: list[dict[str, Any]] = []
        #: Seconds since the epoch of the last look that had a result; 0 before.
        self.looked = 0.0
        threading.Thread(target=self._repeat, name="stores", daemon=True).start()

    def rows(self) -> list[dict[str, Any]]:
        """What the last look found; empty before the first one, and if that had no result."""
        return self._rows

    def _repeat(self) -> None:
        while True:
            try:
                self._rows = look_at_stores(self._file)
                self.looked = time.time()
            except Exception as error:  # noqa: BLE001 - the next look may succeed; a thread that ends never looks
                self._rows = []
                _LOG.warning("%s: %s", type(error).__name__, error)
            time.sleep(_STORES_EVERY_S)
