"""``ssvm quota``: what accounts have stored, what running jobs hold, and what they may have."""

from __future__ import annotations

import argparse
from typing import Any

from ssvm_worker import config
from ssvm_worker.ledger.quota import AccountUsage
from ssvm_worker.wiring import assembly

from .output import Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm quota``."""
    note = "what accounts have stored and may store; `ssvm verify --all` counts anew"
    parser = commands.add_parser("quota", help=note, description=note, parents=[common])
    parser.add_argument("account", nargs="?", metavar="ACCOUNT", help="this one alone; else all")
    parser.set_defaults(command=_quota)


def _quota(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    limits = assembly.quota_limits(settings)
    known = {each.account: each for each in assembly.open_quota(settings).usage()}
    listed = [args.account] if args.account else sorted({*known, *limits.accounts})
    rows = [known.get(each, AccountUsage(each)).to_dict(limits.of(each)) for each in listed]
    output.table(rows, ("account", "used", "reserved", "limit", "free"), "no account has anything")
    return 0
