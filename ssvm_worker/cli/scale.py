"""``ssvm scale``: how many workers a zone should have, for whoever starts and stops them."""

from __future__ import annotations

import argparse
from typing import Any

from ssvm_worker import config

from .output import Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm scale``."""
    scale = commands.add_parser(
        "scale", help="how many workers a zone should have, and which idle ones may go", parents=[common]
    )
    scale.add_argument("--zone", help="of this zone alone; else of all that have workers or jobs")
    scale.set_defaults(command=_scale)


def _scale(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations.demand import decisions  # redis comes with it

    rows = [each.to_dict() for each in decisions(config.load(args.config), args.zone)]
    output.table(rows, ("zone", "workers", "desired", "active", "queued", "removable", "why"), "no zone has any worker")
    return 0
