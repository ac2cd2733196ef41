"""``ssvm reap``, for cron and timers: does once what the reaper of each worker does every few seconds."""

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
    """Add ``ssvm reap``."""
    note = "queue jobs again that lost their worker or message, send due callbacks, delete old records"
    about = (
        "Do once what the reaper of each worker does. Print nothing if there is nothing to do. "
        "If no worker was up, the command runs for as long as a claim lasts."
    )
    parser = commands.add_parser(
        "reap", help=note, description=about, examples=("reap", "reap --json"), parents=[common]
    )
    parser.set_defaults(command=_reap)


def _reap(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.runner.callbacks import open_callbacks
    from ssvm_worker.wiring.celery_sender import send_wakeup  # Celery takes half a second to import

    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        # Delete old records first: on a full broker this frees the memory that the other steps need.
        expired = 0
        while count := ledger.expire():
            expired += count
        found = _find_jobs(settings, ledger)
        not_woken = [each.job_id for each in found if not send_wakeup(settings, each)]
        callbacks_due, callbacks = open_callbacks(settings, ledger), 0
        while callbacks_due.send_due():
            callbacks += 1
        result = {
            "woken": [each.job_id for each in found if each.job_id not in not_woken],
            "not_woken": not_woken,
            "callbacks": callbacks,
            "records": expired,
        }
    text = _text(result)
    if output.as_json or text:
        output.result(result, text)
    return EXIT_RETRYABLE if not_woken else 0


def _find_jobs(settings: Settings, ledger: Ledger) -> list[Any]:
    """Run one round of the reaper and return the jobs that need a message.

    If no round ran for a while, repeat the rounds until all live workers had time to renew their claims.
    """
    from ssvm_worker.wiring.celery_sender import queue_checker

    # Rounds must be closer together than a claim is long. Otherwise the ledger takes each pause for an outage.
    every_s = min(settings.ledger.reap_s, settings.ledger.claim_s / 4)
    found = ledger.reap(every_s, settings.retry.max_attempts, queue_checker(settings))
    while ledger.sparing():
        time.sleep(every_s)
        found += ledger.reap(every_s, settings.retry.max_attempts, queue_checker(settings))
    return found


def _text(result: dict[str, Any]) -> str:
    """Return one line, or nothing if nothing was done."""
    parts = (
        (len(result["woken"]), "woke workers for", "job"),
        (len(result["not_woken"]), "could not wake workers for", "job"),
        (result["callbacks"], "tried", "callback"),
        (result["records"], "deleted", "old record"),
    )
    done = [f"{verb} {count} {noun}{'s' if count > 1 else ''}" for count, verb, noun in parts if count]
    return f"reap {', '.join(done)}" if done else ""
