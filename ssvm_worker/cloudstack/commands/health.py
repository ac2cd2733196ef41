"""CheckHealthCommand."""

from __future__ import annotations

from ssvm_worker.cloudstack.messages import CheckHealthAnswer, CheckHealthCommand
from ssvm_worker.cloudstack.services import Services


def check_health(_: CheckHealthCommand, __: Services) -> CheckHealthAnswer:
    """Answer that the agent works."""
    return CheckHealthAnswer(result=True, details="resource is alive")
