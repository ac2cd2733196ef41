"""``ssvm agent``: the secondary storage agent for a CloudStack management server."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

from ssvm_worker import config

from .output import Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm agent``."""
    agent = commands.add_parser(
        "agent", help="run the secondary storage agent for a CloudStack management server", parents=[common]
    )
    agent.set_defaults(command=_agent)


def _agent(args: argparse.Namespace, output: Output) -> int:  # noqa: ARG001 - every command has both parameters
    # These modules import redis. Imported here, they do not delay other commands.
    from ssvm_worker.cloudstack.agent import Agent
    from ssvm_worker.cloudstack.commands import Dispatcher
    from ssvm_worker.cloudstack.services import open_services
    from ssvm_worker.operations import logs

    settings = config.load(args.config)
    logs.start(settings.log, settings.log.level)
    agent = Agent(settings, Dispatcher(open_services(settings)))

    def stop(*_: object) -> None:
        threading.Thread(target=agent.stop, name="stop", daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    agent.run()
    return 0
