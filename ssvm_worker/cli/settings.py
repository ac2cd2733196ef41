"""``ssvm config``: shows, checks and creates the settings."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssvm_worker import config
from ssvm_worker.config.schema import Settings
from ssvm_worker.config.types import existing_paths
from ssvm_worker.errors import ConfigError, InvalidRequest, misused

from .output import Output

_ACTIONS = ("show", "init", "check", "path")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm config``."""
    parser = commands.add_parser(
        "config",
        help="print the settings in force, check them, or create a settings file",
        description="show: print the settings in force, with secrets as ***. init: create a file with every key and "
        "its explanation. check: report all problems of the settings, also files that do not exist. path: print the "
        "path of the settings file.",
        examples=("config", "config init /etc/ssvm/worker.toml", "config check", "config path"),
        parents=[common],
    )
    parser.add_argument("action", nargs="?", choices=_ACTIONS, default="show", help=f"{', '.join(_ACTIONS)} (show)")
    parser.add_argument("file", nargs="?", metavar="FILE", help="init: the new file, or - for standard output")
    parser.set_defaults(command=_config)


def _config(args: argparse.Namespace, output: Output) -> int:
    if args.file and args.action != "init":
        raise misused(InvalidRequest("Only init takes FILE", args.file, "Name the settings file with --config FILE"))
    if args.action == "init":
        return _init(args, output)
    file = config.find_file(args.config)
    if args.action == "path":
        output.result({"path": str(file) if file else None}, str(file or "no settings file"))
        return 0
    settings = config.load(args.config)
    if args.action == "check":
        if found := [*_wrong_stores(settings), *_unreadable_paths(settings)]:
            raise config.invalid(found, str(file or "the environment"))
        output.result({"path": str(file) if file else None, "ok": True}, f"ok: {file or 'no settings file'}")
        return 0
    values = config.redacted(settings)
    output.result(values, json.dumps(values, indent=2))
    return 0


def _wrong_stores(settings: Settings) -> Iterator[str]:
    """Yield the problems of the stores' URLs. This needs no access to the stores."""
    from ssvm_worker.wiring import assembly

    for name in settings.stores:
        try:
            assembly.open_store_named(settings, name)
        except ConfigError as error:
            key = error.where if error.where.startswith("stores.") else f"stores.{name}.url: {error.where}"
            yield f"{key}: {error.what}. {error.remedy}"


def _unreadable_paths(settings: Settings) -> Iterator[str]:
    """Yield the problems of files and directories that must exist.

    Only ``config check`` asks this, because the files of a worker may be on another machine.
    """
    for key, path, mark in existing_paths(settings):
        problem = f"{key}: the {mark.kind} {path} cannot be read"
        try:
            # Opening a pipe without a writer must not wait.
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            if path.is_dir() != (mark.kind == "directory"):
                yield f"{key}: {path} is not a {mark.kind}. Name a {mark.kind}"
        except PermissionError as error:
            remedy = "Let this user read it, or run the check as the user of the worker"
            yield f"{problem}: {error.strerror}. {remedy}"
        except (OSError, ValueError) as error:
            yield f"{problem}: {getattr(error, 'strerror', None) or error}. Create it, or correct the path"


def _init(args: argparse.Namespace, output: Output) -> int:
    text = (config.shipped_files() / "worker.toml").read_text()
    if args.file == "-":
        print(text, end="")
        return 0
    file = Path(args.file or args.config or os.environ.get("SSVM_CONFIG") or config.DEFAULT_FILE)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The file may get passwords. Its owner and group read it.
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640), "w") as new:
            new.write(text)
    except FileExistsError:
        raise misused(
            InvalidRequest("The file exists, and it was not changed", str(file), "Name another FILE")
        ) from None
    except OSError as error:
        raise ConfigError(f"Cannot write the settings: {error.strerror}", str(file), "Name another FILE") from error
    output.result({"path": str(file)}, f"created {file}\nnext: edit it, then `ssvm doctor --config {file}`")
    return 0
