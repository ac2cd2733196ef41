"""Examine the image stores periodically, in a child process that may hang and is then killed."""

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
#: Seconds between two examinations, and for one of them.
_STORES_EVERY_S, _STORES_LIMIT_S = 60.0, 30.0
_FIELDS = {"name", "state"}


def look_at_stores(settings_file: str | None) -> list[dict[str, Any]]:
    """Return the rows of ``ssvm stores --json`` from a child process, which is killed if a store hangs.

    Raise StoreUnavailable without a result, for example if the process cannot start.
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
    """A thread that examines the stores periodically, so that no scrape waits for them."""

    def __init__(self, settings_file: str | None) -> None:
        self._file = settings_file
        self._rows: list[dict[str, Any]] = []
        #: Time of the last examination with a result, in seconds since the epoch; 0 for none.
        self.looked = 0.0
        threading.Thread(target=self._repeat, name="stores", daemon=True).start()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the last examination; empty before the first one, and if it had no result."""
        return self._rows

    def _repeat(self) -> None:
        while True:
            try:
                self._rows = look_at_stores(self._file)
                self.looked = time.time()
            except Exception as error:  # noqa: BLE001 - the next examination may succeed, and the thread must not end
                self._rows = []
                _LOG.warning("%s: %s", type(error).__name__, error)
            time.sleep(_STORES_EVERY_S)
