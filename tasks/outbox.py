"""Who hears of a job's end: the callbacks, by the settings."""

from __future__ import annotations

import logging

from ssvm_worker.addresses import AddressRule
from ssvm_worker.assembly import shown
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger import Ledger
from ssvm_worker.ledger.callback import Callbacks, CallbackSettings
from ssvm_worker.retry import RetryPolicy
from ssvm_worker.settings import Settings

_LOG = logging.getLogger("ssvm.callback")


def open_outbox(settings: Settings, ledger: Ledger) -> Callbacks:
    """The callbacks of the ledger."""
    given, retry = settings.callback, settings.retry
    return Callbacks(
        ledger,
        CallbackSettings(
            secret=given.secret.get_secret_value() if given.secret else None,
            timeout_s=given.timeout_s,
            rule=AddressRule(given.allow_networks),
            max_tries=given.max_tries,
            ca_file=str(given.ca_file) if given.ca_file else None,
            policy=RetryPolicy(first_delay_s=retry.first_delay_s, max_delay_s=retry.max_delay_s),
        ),
        shown,
    )


def tell(settings: Settings, ledger: Ledger, job_id: str) -> None:
    """Send the callback of a job that has just ended; if that fails, the reaper tries again."""
    try:
        open_outbox(settings, ledger).send_due(job_id)
    except WorkerError as error:
        _LOG.warning("the callback of job %s waits: %s", job_id, error)
