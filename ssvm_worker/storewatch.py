"""The health of the image stores, looked at now and then by a process that may hang and be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

#: Seconds between two looks at the stores, and for one of them: it may hang, and is killed then.
_STORES_EVERY_S, _STORES_LIMIT_S = 60.0, 30.0


def look_at_stores(settings_file: str | None) -> list[dict[str, Any]]:
    """The rows of ``ssvm stores --json``, by a process of its own, which is killed if a store makes it hang."""
    command = [sys.executable, "-m", "ssvm_worker", "stores", "--json"]
    command += ["--config", settings_file] if settings_file else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=_STORES_LIMIT_S)
        rows = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return []
    return rows if isinstance(rows, list) else []


class StoreWatch:
    """Looks at the stores now and then, in a thread, so that no scrape waits for them."""

    def __init__(self, settings_file: str | None) -> None:
        self._file = settings_file
        self._rows: list[dict[str, Any]] = []
        threading.Thread(target=self._repeat, name="stores", daemon=True).start()

    def rows(self) -> list[dict[str, Any]]:
        """What was found last; empty before that, and while they hang."""
        return self._rows

    def _repeat(self) -> None:
        while True:
            self._rows = look_at_stores(self._file)
            time.sleep(_STORES_EVERY_S)
