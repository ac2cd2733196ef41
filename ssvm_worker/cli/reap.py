"""``ssvm reap``: what each worker's reaper does every few seconds, done once, for cron and timers."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from ssvm_worker import config
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import EXIT_RETRYABLE
from ssvm_worker.wiring import assembly

from .output import Output

if TYPE_CHECKING:
    from ssvm_worker.ledger.ledger import Ledger


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm reap``."""
    note = "queue again what lost its worker or message, send callbacks that are due; quiet when there is nothing"
    about = "Do what every worker's reaper does, once; it takes as long as a claim lasts if no worker was up to do it."
    parser = commands.add_parser("reap", help=note, description=about, parents=[common])
    parser.set_defaults(command=_reap)


def _reap(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.wiring.celery_sender import ring  # Celery takes half a second to import

    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        records = _expire(ledger)  # first, as it may make the room that all else needs
        found = _rounds(settings, ledger)
        silent = [each.job_id for each in found if not ring(settings, each)]
        result = {
            "rung": [each.job_id for each in found if each.job_id not in silent],
            "not_rung": silent,
            "callbacks": _callbacks(settings, ledger),
            "records": records,
        }
    text = _text(result)
    if output.as_json or text:
        output.result(result, text)
    return EXIT_RETRYABLE if silent else 0


def _rounds(settings: Settings, ledger: Ledger) -> list[Any]:
    """One round; where nobody has made any for a while, as many as it takes until the living have renewed."""
    from ssvm_worker.wiring.celery_sender import standing

    # Rounds must be closer than claims are long, or the ledger takes the time between them for an outage.
    every_s = min(settings.ledger.reap_s, settings.ledger.claim_s / 4)
    given = (every_s, settings.retry.max_attempts)
    found = ledger.reap(*given, standing(settings))
    while ledger.sparing():
        time.sleep(every_s)
        found += ledger.reap(*given, standing(settings))
    return found


def _callbacks(settings: Settings, ledger: Ledger) -> int:
    from ssvm_worker.runner.callbacks import open_outbox

    outbox, count = open_outbox(settings, ledger), 0
    while outbox.send_due():
        count += 1
    return count


def _expire(ledger: Ledger) -> int:
    count = 0
    while gone := ledger.expire():
        count += gone
    return count


def _text(result: dict[str, Any]) -> str:
    """One line, or nothing."""
    parts = (
        (len(result["rung"]), "rang for", "job"),
        (len(result["not_rung"]), "could not ring for", "job"),
        (result["callbacks"], "tried", "callback"),
        (result["records"], "dropped", "old record"),
    )
    said = [f"{did} {count} {what}{'s' if count > 1 else ''}" for count, did, what in parts if count]
    return f"reap {', '.join(said)}" if said else ""
