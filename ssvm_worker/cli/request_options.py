"""Options of the command line for the fields of a request.

The options are derived from the request's model, so a new field needs no change here.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssvm_worker.errors import InvalidRequest, misused
from ssvm_worker.jobs import JOBS, Job

from .parser import CommandParser

#: Two examples of each job: its options after ``ssvm run JOB`` and ``ssvm submit JOB``.
_EXAMPLES = {
    "download": (
        "--url https://example.org/a.qcow2 --account 2 --id 201",
        "--request download.json --max-rate 50MiB/s",
    ),
    "fetch": ("--urls http://a/1 --keys snapshots/2/5/1 --store primary", "--request fetch.json"),
    "upload": (
        "--key template/tmpl/2/7/7.qcow2 --url https://example.org/a",
        "--key volumes/2/8/8.raw --url s3://b/k --credentials c",
    ),
    "backup": (
        "--vcenter vc1 --vm vm-42 --account 2 --volume web --id 1",
        "--request backup.json --disks scsi0:1",
    ),
    "restore": (
        "--account 2 --volume web --id 1 --vcenter vc1 --name web-2",
        "--account 2 --volume web --id 1 --disk 0 --template 301",
    ),
    "consolidate": ("--request consolidate.json", "--request consolidate.json --patient"),
    "copy": (
        "--account 2 --id 201 --source primary --stores archive",
        "--all --source primary --stores archive --patient",
    ),
    "transfer": (
        "--source primary --key snapshots/2/5 --store archive",
        "--source a --key volumes/2/5 --store a --to volumes/2/6",
    ),
    "split": (
        "--account 2 --id 201 --disk web-disk1.vmdk --template 202",
        "--account 2 --id 201 --disk web-disk0.vmdk --template 201",
    ),
    "verify": ("--account 2 --id 201 --stores primary", "--all --rate 50MiB/s"),
    "delete": ("--account 2 --id 201", "--kind backup --account 2 --volume web --id 1"),
    "cleanup": ("--older-than 7d --dry-run", "--volume snapshots/2/web"),
}


class JobParser(CommandParser):
    """The parser of one job, as in ``ssvm run JOB``. It adds the options of the job's fields when it parses."""

    job: Job | None = None
    _has_fields = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the options of the job's fields, then parse."""
        self.add_fields()
        return super().parse_known_args(args, namespace)

    def add_fields(self) -> None:
        """Add the options of the job's fields, unless this is done."""
        if self.job is None or self._has_fields:
            return
        self._has_fields = True
        self.add_argument("--request", metavar="FILE", help="read the request, a JSON object, from FILE (- for stdin)")
        fields = self.job.Request.model_fields
        needed = {name: each for name, each in fields.items() if each.is_required()}
        others = {name: each for name, each in fields.items() if name not in needed}
        if needed:
            _add_options(self.add_argument_group("required fields, as options or in --request"), needed)
        _add_options(self.add_argument_group("other fields"), others)
        # A no-break space keeps an option and its value on one line.
        shown = "".join(f" {_option(name)}\xa0{_metavar(name, each.annotation)}" for name, each in needed.items())
        indent = " " * len(f"usage: {self.prog} ")
        # A fixed usage is not wrapped by argparse. Without it, 30 options hide the required ones.
        self.usage = textwrap.fill(f"{self.prog}{shown} [OPTION …]", 72, subsequent_indent=indent).replace("\xa0", " ")


def _add_options(group: Any, fields: Mapping[str, FieldInfo]) -> None:
    for name, field in fields.items():
        note, shape = (field.description or "").replace("%", "%%"), _shape(field.annotation)
        metavar = _metavar(name, field.annotation)
        if shape is dict:
            note = f"{note} (repeatable)"
            group.add_argument(_option(name), metavar=metavar, action="append", type=_pair, help=note)
        elif field.annotation is bool:
            group.add_argument(_option(name), action=argparse.BooleanOptionalAction, default=None, help=note)
        elif shape is list:
            note = f"{note} (comma-separated or repeated)"
            group.add_argument(_option(name), metavar=metavar, action="append", help=note)
        else:
            group.add_argument(_option(name), metavar=metavar, help=note)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(name: str, annotation: Any) -> str:
    """Return how the help shows the value of a field: its choices, its form, or the name of the field."""
    shape = _shape(annotation)
    if shape is typing.Literal:
        return "|".join(filter(None, typing.get_args(_plain(annotation))))
    return {dict: "NAME=VALUE", list: "A,B"}.get(shape, name.upper())


def add_jobs(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> Iterator[JobParser]:
    """Yield a parser for each job, with one option per field and ``--request FILE|-`` for the complete object."""
    jobs = parser.add_subparsers(title="jobs", metavar="JOB", required=True, parser_class=JobParser)
    command = parser.prog.removeprefix("ssvm ")
    for job in JOBS.values():
        each = jobs.add_parser(
            job.name,
            help=job.summary,
            description=job.summary,
            parents=[common],  # type: ignore[list-item]  # typeshed allows only ArgumentParser here
            examples=[f"{command} {job.name} {options}" for options in _EXAMPLES[job.name]],
        )
        each.job = job
        each.set_defaults(job=job)
        yield each


def read_request(args: argparse.Namespace, model: type[BaseModel]) -> dict[str, Any]:
    """Return the request object: the fields of the file, overridden by the options.

    Raises InvalidRequest if the file cannot be read or is not a JSON object.
    """
    values = _read_file(args.request) if args.request else {}
    for name, field in model.model_fields.items():
        given = getattr(args, name, None)
        if given is None:
            continue
        shape = _shape(field.annotation)
        if shape is dict:
            given = dict(given)
        elif shape is list:
            given = [each.strip() for item in given for each in item.split(",") if each.strip()]
        values[name] = given
    return values


def _read_file(name: str) -> dict[str, Any]:
    try:
        values = json.loads(sys.stdin.read() if name == "-" else Path(name).read_text())
    except OSError as error:
        raise misused(
            InvalidRequest(f"Cannot read the request file: {error.strerror}", name, "Check --request")
        ) from error
    except ValueError as error:
        raise misused(InvalidRequest(f"The request is not JSON: {error}", name, "Give one JSON object")) from error
    if not isinstance(values, dict):
        raise misused(InvalidRequest("The request is not a JSON object", name, "See `ssvm schema`"))
    return values


def _plain(annotation: Any) -> Any:
    """Return X for ``X | None``, and any other annotation as it is."""
    others = [each for each in typing.get_args(annotation) if each is not types.NoneType]
    is_optional = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return others[0] if is_optional else annotation


def _shape(annotation: Any) -> Any:
    """Return list, dict or Literal, or None for a plain value. ``X | None`` counts as X."""
    origin = typing.get_origin(_plain(annotation))
    return origin if origin in (list, dict, typing.Literal) else None


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    return name.strip(), value.strip()
