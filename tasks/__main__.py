"""Celery's command line for this app: ``python -P -m tasks worker | beat | flower | inspect | control …``.

``celery -A tasks.app`` searches the current directory for ``tasks`` first, and would run any such file there. With
``-P`` Python does not. Celery gets the app object, so it imports nothing from that directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from celery import Celery
from celery.bin.base import CLIContext

from ssvm_worker.errors import ConfigError, extra_missing
from ssvm_worker.ledger.embedded import require_server

#: The module that each word of a command line needs, and the extra that installs it.
_EXTRAS = {"flower": ("flower", "flower"), "redbeat.RedBeatScheduler": ("redbeat", "redbeat")}


def main(argv: list[str]) -> None:
    """Run the command, and exit with its status."""
    for word in argv:
        module, extra = _EXTRAS.get(word, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            sys.exit(_explained(extra_missing(f"{module} is not installed", word, extra)))
    try:
        from .app import app, settings

        if "worker" in argv and settings.broker.embedded:  # Celery ignores errors that are raised when it starts
            require_server()
    except ConfigError as error:
        sys.exit(_explained(error))
    for name in app.conf.include:  # Celery itself would add the current directory to sys.path
        importlib.import_module(name)
    _run(app, argv)


def _run(app: Celery, argv: list[str]) -> None:
    """Run Celery's command. Import only that of worker or beat: the whole command line doubles their start-up time."""
    if argv[:1] in (["worker"], ["beat"]):
        [name, *rest] = argv
        command = getattr(importlib.import_module(f"celery.bin.{name}"), name)
        context = CLIContext(app=app, no_color="NO_COLOR" in os.environ, workdir=None)
        prefix = f"CELERY_{name.upper()}"
        command.main(rest, prog_name=f"python -P -m tasks {name}", obj=context, auto_envvar_prefix=prefix)
    from celery.bin.celery import celery

    celery.params[0].default = app
    celery(argv, prog_name="python -P -m tasks", auto_envvar_prefix="CELERY")


def _explained(error: ConfigError) -> int:
    print(f"ConfigError: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main(sys.argv[1:])
