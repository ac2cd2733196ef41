"""Options of the command line for the fields of a request.

The options are derived from the request's model, so a new field needs no change here.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ssvm_worker.errors import InvalidRequest, misused
from ssvm_worker.jobs import JOBS, Job

from .parser import CommandParser


class JobParser(CommandParser):
    """The parser of one job, as in ``ssvm run JOB``. It adds the options of the job's fields when it parses."""

    job: Job | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the options of the job's fields, then parse."""
        if self.job is not None:
            self.add_argument(
                "--request", metavar="FILE", help="read the request, a JSON object, from FILE (- for stdin)"
            )
            group = self.add_argument_group("request")
            for name, field in self.job.Request.model_fields.items():
                option = f"--{name.replace('_', '-')}"
                shape = _shape(field.annotation)
                note = field.description or ""
                if shape is dict:
                    group.add_argument(
                        option, metavar="NAME=VALUE", action="append", type=_pair, help=f"{note} (repeatable)"
                    )
                elif field.annotation is bool:
                    group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=note)
                elif shape is list:
                    group.add_argument(
                        option, metavar="A,B", action="append", help=f"{note} (comma-separated or repeated)"
                    )
                else:
                    group.add_argument(option, metavar=name.upper(), help=note)
            self.job = None
        return super().parse_known_args(args, namespace)


def add_jobs(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> Iterator[JobParser]:
    """Yield a parser for each job, with one option per field and ``--request FILE|-`` for the complete object."""
    jobs = parser.add_subparsers(title="jobs", metavar="JOB", required=True, parser_class=JobParser)
    for job in JOBS.values():
        each = jobs.add_parser(job.name, help=job.summary, description=job.summary, parents=[common])  # type: ignore[list-item]  # typeshed allows only ArgumentParser here
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


def _shape(annotation: Any) -> Any:
    """Return list or dict, or None for a plain value. ``X | None`` counts as X."""
    if isinstance(annotation, types.UnionType):
        annotation = next(each for each in typing.get_args(annotation) if each is not types.NoneType)
    origin = typing.get_origin(annotation)
    return origin if origin in (list, dict) else None


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    return name.strip(), value.strip()
