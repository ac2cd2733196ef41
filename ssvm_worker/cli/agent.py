"""``ssvm agent``: the secondary storage agent for a CloudStack management server."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from typing import Any

from ssvm_worker import config
from ssvm_worker.cloudstack import properties
from ssvm_worker.config.cloudstack_section import CloudStackSection
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ConfigError

from .output import Output

#: A key of [cloudstack], and other keys that replace what a file of CloudStack says about it.
_REPLACED = {
    "CA_FILE": ("ca_file", "fingerprint", "insecure"),
    "CERTIFICATE_FILE": ("certificate_file",),
    "KEY_FILE": ("key_file",),
    "CERTIFICATE_SCRIPT": ("certificate_script",),
    "WEB_ROOT": ("web_root",),
}


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm agent``."""
    agent = commands.add_parser(
        "agent",
        help="run the secondary storage agent for a CloudStack management server",
        examples=("agent", "agent --from-cmdline"),
        parents=[common],
    )
    add_sources(agent)
    agent.set_defaults(command=_agent)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a file of CloudStack with the settings of an agent."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from-cmdline",
        nargs="?",
        const=properties.CMDLINE,
        metavar="FILE",
        help="read servers, zone, name and addresses from FILE, as a system VM has it "
        f"(default: {properties.CMDLINE}); certificates are in {properties.CONF}; SSVM_… variables take precedence",
    )
    source.add_argument(
        "--properties",
        metavar="FILE",
        help="read them from FILE, an agent.properties of the Java agent, with the certificates in its directory",
    )


def _agent(args: argparse.Namespace, output: Output) -> int:  # noqa: ARG001 - every command has both parameters
    # These modules import redis. Imported here, they do not delay other commands.
    from ssvm_worker.cloudstack.agent import Agent
    from ssvm_worker.cloudstack.commands import Dispatcher
    from ssvm_worker.cloudstack.guid_claim import GuidClaim
    from ssvm_worker.cloudstack.services import open_services
    from ssvm_worker.operations import logs
    from ssvm_worker.wiring import assembly

    settings = agent_settings(args)
    logs.start(settings.log, settings.log.level)
    section = settings.cloudstack
    guid = section.guid or section.name or ""
    claim = GuidClaim(assembly.open_agents(settings), guid, settings.zone, settings.ledger.claim_s)
    dispatcher = Dispatcher(open_services(settings))
    agent = Agent(settings, dispatcher, joint=dispatcher.answer_together, claim=claim)

    def stop(*_: object) -> None:
        threading.Thread(target=agent.stop, name="stop", daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    claim.start()
    try:
        agent.run()
    finally:
        claim.release()
    return 0


def agent_settings(args: argparse.Namespace) -> Settings:
    """Return the settings, with what CloudStack has written for its own agent. Raise ConfigError."""
    if args.from_cmdline:
        found = properties.environment_of_cmdline(args.from_cmdline)
    elif args.properties:
        found = properties.environment_of_properties(args.properties)
    else:
        return config.load(args.config)
    try:
        given = config.load(args.config).cloudstack
    except ConfigError:  # the file may lack what CloudStack's file has; the second load reports everything else
        given = CloudStackSection()
    for key, others in _REPLACED.items():
        if any(getattr(given, each) for each in others):
            found.pop(f"SSVM_CLOUDSTACK__{key}", None)
    return config.load(args.config, found | os.environ)
