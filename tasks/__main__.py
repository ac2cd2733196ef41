"""Celery's command line for our app: ``python -P -m tasks worker | beat | flower | inspect | control …``.

``celery -A tasks.app`` looks for ``tasks`` in the current directory first, and would run whatever file it finds there.
With ``-P`` Python does not, and Celery is given the app, so that it imports nothing from that directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from celery.bin.celery import celery

from ssvm_worker.errors import ConfigError
from ssvm_worker.ledger.embedded import require_server

#: What each word of a command line needs beside the package itself: the module, and the extra that brings it.
_EXTRAS = {"flower": ("flower", "flower"), "redbeat.RedBeatScheduler": ("redbeat", "redbeat")}


def main(argv: list[str]) -> None:
    """Run the command, and exit with its status."""
    for word in argv:
        module, extra = _EXTRAS.get(word, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            sys.exit(_explained(ConfigError(f"{module} is not installed", word, f"pip install 'ssvm-worker[{extra}]'")))
    try:
        from .app import app, settings

        if "worker" in argv and settings.broker.embedded:  # Celery swallows what is raised when it starts
            require_server()
    except ConfigError as error:
        sys.exit(_explained(error))
    for name in app.conf.include:  # Celery would put the current directory into sys.path for that
        importlib.import_module(name)
    celery.params[0].default = app
    celery(argv, prog_name="python -P -m tasks", auto_envvar_prefix="CELERY")


def _explained(error: ConfigError) -> int:
    print(f"ConfigError: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main(sys.argv[1:])
