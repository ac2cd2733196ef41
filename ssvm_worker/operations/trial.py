"""A trial of a vCenter on a scratch VM, with an anonymous report: ``ssvm doctor --trial``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssvm_worker import __version__
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import Cancelled
from ssvm_worker.formats.writers.vmdk import stream_optimized
from ssvm_worker.wiring.connections import ConfiguredConnections

from .finding import Finding

#: The form of the report.
_VERSION = 1


def trial_disk() -> bytes:
    """Return the stream of the disk that a trial imports: one grain with a text."""
    from ssvm_worker.vmware.trial_import import DISK_SIZE  # imports pyVmomi

    return b"".join(stream_optimized([(0, b"ssvm doctor --trial")], DISK_SIZE, "the trial's disk"))


def describe_trial() -> list[Finding]:
    """Return what each question of a trial does, in their order."""
    from ssvm_worker.vmware.trial import QUESTIONS  # imports pyVmomi

    return [Finding(each.name, True, each.does) for each in QUESTIONS]


@dataclass(frozen=True)
class TrialOptions:
    """The limits of a trial."""

    #: Seconds after which the trial stops.
    limit_s: float
    #: Whether the trial may create and remove another VM.
    with_import: bool = False


def try_vcenter(
    settings: Settings, name: str, vm: str, options: TrialOptions, tell: Callable[[str], None]
) -> tuple[dict[str, Any], list[Finding]]:
    """Ask the vCenter all questions on the scratch VM *vm*. Return the report, and the answers as findings.

    The trial stops after the limit, removes its snapshot, and returns the answers so far.
    Raises InvalidRequest for a VM that is no scratch VM.
    """
    deadline = time.monotonic() + options.limit_s

    def check() -> None:
        if time.monotonic() > deadline:
            raise Cancelled("deadline")

    job_id = f"trial-{secrets.token_hex(4)}%"  # the character shows whether vCenter escapes it
    with ConfiguredConnections(settings).vcenter(name, check) as session:
        made = session.find_vm(vm).trial(job_id, tell, disk=trial_disk() if options.with_import else b"")
    head = {"report": "ssvm doctor --trial", "version": _VERSION, "worker": __version__}
    findings = [_finding(each, answer) for each, answer in made.answers.items()]
    if not made.is_clean:
        what = f"The snapshot ssvm-backup-{job_id} is left. Remove it in vCenter"
        findings.append(Finding("clean-up", False, what))
    return head | {"answers": made.answers, "switches": made.switches}, findings


def _finding(name: str, answer: dict[str, Any]) -> Finding:
    plain = {key: value for key, value in answer.items() if not isinstance(value, dict)}
    detail = ", ".join(f"{key}: {len(value) if isinstance(value, list) else value}" for key, value in plain.items())
    return Finding(name, True, detail, warning=bool({"failed", "not_asked", "withheld"} & answer.keys()))
