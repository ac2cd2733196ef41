"""``ssvm install-files``: writes the files that an operator copies and edits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssvm_worker import config
from ssvm_worker.errors import ConfigError

from .output import Output

#: The virtual environment that the files of config/ name. Written files name the one that runs this command.
_ENVIRONMENT = "/opt/ssvm-worker/.venv/"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm install-files``."""
    parser = commands.add_parser(
        "install-files",
        help="write example settings, systemd units, alert rules, a dashboard and more to a directory",
        description="Write the files of config/: settings, systemd units, crontab, alert rules, dashboard, Flower's "
        "settings and Kubernetes manifests. Units and crontab get the path of this installation. A file that exists "
        "with other content stays as it is.",
        examples=("install-files /etc/ssvm/files", "install-files --force /etc/ssvm/files"),
        parents=[common],
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory, which may not exist yet")
    parser.add_argument("--force", action="store_true", help="replace files that exist with other content")
    parser.set_defaults(command=_install_files)


def _install_files(args: argparse.Namespace, output: Output) -> int:
    rows = []
    for name, text in _files():
        file = args.directory / name
        try:
            state = "new" if not file.exists() else "unchanged" if file.read_text() == text else "changed"
            if state == "new" or (state == "changed" and args.force):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                # The settings may get passwords, so only their owner and group read them.
                file.chmod(0o755 if file.suffix == ".sh" else 0o640 if file.name == "worker.toml" else 0o644)
                state = "written"
        except OSError as error:
            what = f"Cannot write the file: {error.strerror}"
            raise ConfigError(what, str(file), "Name another DIR, or run as root") from error
        rows.append({"file": name, "state": "kept" if state == "changed" else state})
    output.table(rows, ("state", "file"), "no files")
    if kept := sum(each["state"] == "kept" for each in rows):
        output.note(f"{kept} files exist with other content and were kept. --force replaces them")
    return 0


def _files() -> Iterator[tuple[str, str]]:
    """Yield the relative path and the text of each file."""
    source = config.shipped_files()
    for file in sorted(source.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield str(file.relative_to(source)), file.read_text().replace(_ENVIRONMENT, f"{sys.prefix}/")
