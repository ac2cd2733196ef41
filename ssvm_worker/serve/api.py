"""The HTTP API for other programs: submit, list, show, retry and cancel jobs, with a token instead of the broker's.

A request passes the checks of the command line, and a record is redacted like there. An error is a problem document
(RFC 9457) with ``problem``, ``object`` and ``remedy``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from itertools import islice
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from ssvm_worker.config.findings import suggestion
from ssvm_worker.config.schema import CONTRACT_VERSION, LANES, Settings
from ssvm_worker.config.serve_section import ServeSection
from ssvm_worker.errors import (
    EXIT_USAGE,
    ConfigError,
    InvalidRequest,
    ObjectNotFound,
    Permanent,
    ResourceBusy,
    StoreDenied,
    WorkerError,
    misused,
)
from ssvm_worker.jobs import find_job
from ssvm_worker.jobs.request import MAX_BYTES
from ssvm_worker.ledger.job_filter import JobFilter
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import HELD, INBOUND, STATES
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.units import KiB
from ssvm_worker.wiring.assembly import new_job, shown
from ssvm_worker.wiring.celery_sender import send_wakeup

from .openapi import BASE, MAX_LIMIT, MAX_OFFSET, openapi
from .responses import respond
from .uvicorn_protocol import KEEP

_LOG = logging.getLogger("ssvm.serve")
#: The request of a job, and the names around it.
_MAX_BODY = MAX_BYTES + 4 * KiB
_FILTERS = ("state", "zone", "lane", "job", "account", "error", "limit", "offset")
_TYPE = "application/json"


@dataclass(frozen=True)
class TokenCheck:
    """The tokens of the settings, by the name of the program that has each."""

    tokens: Mapping[str, str]

    @classmethod
    def of(cls, section: ServeSection) -> TokenCheck:
        """Return the tokens of the settings, or raise ConfigError if there are none."""
        if not section.tokens:
            remedy = "Give the program a token: [serve.tokens.NAME] secret_file = PATH"
            raise ConfigError("The API needs a token", "serve.tokens", remedy)
        return cls({name: each.secret.get_secret_value() for name, each in section.tokens.items()})

    def name_of(self, request: Request) -> str:
        """Return the name of the sender's token. Raise HTTPException 401 for an unknown token."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = ""
        for name, token in self.tokens.items():  # always all of them, so that the time shows nothing
            if hmac.compare_digest(token.encode(), given.strip().encode()):
                found = name
        if not found or scheme.lower() != "bearer":
            raise HTTPException(401, "The token is missing or unknown", {"WWW-Authenticate": "Bearer"})
        return found


@dataclass(frozen=True)
class ApiCall:
    """One request of a program with a known token."""

    request: Request
    #: The name of the token.
    by: str
    #: The JSON of the body, or None.
    body: Any

    @property
    def job_id(self) -> str:
        """Return the id in the path."""
        return str(self.request.path_params["job_id"])


@dataclass(frozen=True)
class JobApi:
    """The operations. Each returns a document and a status. They block, so the endpoints call them in threads."""

    settings: Settings
    ledger: Ledger

    def submit(self, call: ApiCall) -> tuple[Any, int]:
        """Queue the job of a submission. The status is 201 for a new job, and 200 for a known one."""
        data = call.body
        if not isinstance(data, dict):
            raise _usage("The body is not an object", "", 'Send {"job": "download", "request": {…}}')
        known = ("schema", "job", "zone", "request")
        if unknown := next((each for each in data if each not in known), None):
            raise _usage(f"{unknown[:60]!a}: unknown{suggestion(unknown, known)}", "body", f"Send {', '.join(known)}")
        if data.get("schema", CONTRACT_VERSION) != CONTRACT_VERSION or isinstance(data.get("schema"), bool):
            raise _usage("Unknown version of the contract", "schema", f"Send {CONTRACT_VERSION}, or leave it out")
        job, zone = data.get("job", ""), data.get("zone", "")
        if not isinstance(job, str) or not isinstance(zone, str) or "request" not in data:
            raise _usage("job, request or zone is missing or has a wrong type", "body", f"See {BASE}/openapi.json")
        new = new_job(self.settings, find_job(job), data["request"], zone=zone)
        trace = traceparent(call.request.headers.get("traceparent"))
        record, is_new = self.ledger.submit(replace(new, traceparent=trace))
        if is_new:
            _LOG.info("job %s was submitted by %s", record.job_id, call.by)
            send_wakeup(self.settings, record)
        return shown(record), 201 if is_new else 200

    def page(self, call: ApiCall) -> tuple[Any, int]:
        """Return the newest jobs that match the query, and whether there are more."""
        query = call.request.query_params
        if unknown := next((each for each in query if each not in _FILTERS), None):
            raise _usage(f"{unknown[:60]!a}: unknown{suggestion(unknown, _FILTERS)}", "query", "Correct its name")
        limit, offset = _number(query, "limit", 50, 1, MAX_LIMIT), _number(query, "offset", 0, 0, MAX_OFFSET)
        wanted = JobFilter(
            states=(_choice(query, "state", STATES),) if query.get("state") else STATES,
            zone=query.get("zone") or None,
            lane=_choice(query, "lane", (*LANES, INBOUND, HELD)) if query.get("lane") else None,
            job=query.get("job") or None,
            account=query.get("account") or None,
            error=query.get("error") or None,
        )
        records = list(islice(self.ledger.find(wanted), offset, offset + limit + 1))
        jobs = [shown(each) for each in records[:limit]]
        return {"schema": CONTRACT_VERSION, "jobs": jobs, "more": len(records) > limit}, 200

    def show(self, call: ApiCall) -> tuple[Any, int]:
        """Return the record of a job."""
        return shown(self.ledger.get(call.job_id)), 200

    def retry(self, call: ApiCall) -> tuple[Any, int]:
        """Queue a failed or cancelled job again."""
        record = self.ledger.retry(call.job_id, call.by)
        send_wakeup(self.settings, record)
        return shown(record), 200

    def cancel(self, call: ApiCall) -> tuple[Any, int]:
        """Cancel a queued job, or ask the worker of a running job to stop."""
        return shown(self.ledger.cancel(call.job_id, call.by)), 200


def _usage(what: str, where: str, remedy: str) -> InvalidRequest:
    return misused(InvalidRequest(what, where, remedy))


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise _usage("Not a number of this range", name, f"Give {least} to {most}")
    return int(text)


def _choice(query: Mapping[str, str], name: str, known: Collection[str]) -> str:
    if query[name] not in known:
        raise _usage(f"Unknown value {query[name][:60]!a}", name, f"Give one of {', '.join(known)}")
    return query[name]


@dataclass(frozen=True)
class ApiEndpoint:
    """One path of the API: checks the token, reads the body, and answers with JSON."""

    check: TokenCheck
    #: By method.
    operations: Mapping[str, Callable[[ApiCall], tuple[Any, int]]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except (HTTPException, WorkerError) as error:
            response = problem(request, error)
        await respond(request, response, send)

    async def _answer(self, request: Request) -> Response:
        operation = self.operations.get(request.method)
        if operation is None:
            raise HTTPException(405, "This method is not allowed", {"Allow": ", ".join(self.operations)})
        by = self.check.name_of(request)
        request.scope[KEEP]()
        body = await _json_body(request) if request.method == "POST" else None
        value, status = await asyncio.to_thread(operation, ApiCall(request, f"{by} (api)", body))
        headers = {"Location": f"{BASE}/jobs/{value['job_id']}"} if status == 201 else None
        return JSONResponse(value, status, headers)


async def _json_body(request: Request) -> Any:
    """Return the JSON of the body, or None for an empty one. Raise HTTPException 413 or 415."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise HTTPException(413, f"The body has more than {_MAX_BODY} bytes")
    if not body:
        return None
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _TYPE:
        raise HTTPException(415, f"The content type is not {_TYPE}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _usage(f"The body is not JSON: {type(error).__name__}", "body", "Send one JSON object") from None


def problem(request: Request, error: HTTPException | WorkerError) -> Response:
    """Return the problem document of an error."""
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        name = HTTPStatus(status).phrase.replace(" ", "")
        what, where, remedy, retryable = str(error.detail), request.url.path, f"See {BASE}/openapi.json", False
    else:
        name, status = type(error).__name__, _status(error)
        headers = {"Retry-After": "5"} if status == 503 else {}
        what, where, remedy, retryable = error.what, error.where, error.remedy, error.retryable
        _LOG.log(
            logging.WARNING if status >= 500 else logging.INFO, "%s %s: %s", request.method, request.url.path, error
        )
    document = {
        "type": f"urn:ssvm:error:{name}",
        "title": name,
        "status": status,
        "detail": f"{what}. {remedy}".removesuffix(". "),
        "problem": what,
        "object": where,
        "remedy": remedy,
        "retryable": retryable,
    }
    return JSONResponse(document, status, headers, "application/problem+json")


def _status(error: WorkerError) -> int:
    """Return 400 for a wrong request, 404, 409 for one that the job's state excludes, and 503 to try again."""
    if isinstance(error, ObjectNotFound):
        return 404
    if isinstance(error, InvalidRequest):
        return 400 if error.exit_code == EXIT_USAGE else 409
    if isinstance(error, ResourceBusy):
        return 409
    return 500 if isinstance(error, Permanent) and not isinstance(error, StoreDenied) else 503


def api_routes(settings: Settings, ledger: Ledger) -> list[BaseRoute]:
    """Return the routes. Raise ConfigError if the settings have no token."""
    api, check = JobApi(settings, ledger), TokenCheck.of(settings.serve)
    paths: dict[str, dict[str, Callable[[ApiCall], tuple[Any, int]]]] = {
        "/jobs": {"GET": api.page, "POST": api.submit},
        "/jobs/{job_id}": {"GET": api.show},
        "/jobs/{job_id}/retry": {"POST": api.retry},
        "/jobs/{job_id}/cancel": {"POST": api.cancel},
    }
    document = openapi()

    async def describe(_: Request) -> Response:
        return JSONResponse(document)

    async def unknown(request: Request) -> Response:
        return problem(request, HTTPException(404, "There is no such path"))

    routes: list[BaseRoute] = [Route(f"{BASE}{path}", ApiEndpoint(check, each)) for path, each in paths.items()]
    others = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return [Route(f"{BASE}/openapi.json", describe), *routes, Route(f"{BASE}/{{rest:path}}", unknown, methods=others)]
