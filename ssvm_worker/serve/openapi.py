"""The OpenAPI document of the HTTP API, which contains the JSON Schemas of the contract."""

from __future__ import annotations

from typing import Any

from ssvm_worker.artifacts.layout import ZONE
from ssvm_worker.config.schema import CONTRACT_VERSION, LANES
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.record import HELD, INBOUND, STATES
from ssvm_worker.wiring.json_schemas import identity, schemas

#: The path of the API. A new version of the contract gets another one.
BASE = f"/api/v{CONTRACT_VERSION}"
#: The most jobs of one answer, and the most that a query skips.
MAX_LIMIT, MAX_OFFSET = 500, 100_000
_COMPONENTS = "#/components/schemas/"
_ERRORS = {
    400: "The request is wrong. Nothing has changed",
    401: "The token is missing or unknown",
    404: "There is no such job",
    405: "The path does not have this method",
    409: "The state of the job, or another request with this job_id, excludes this",
    413: "The body is too large",
    415: "The body is not application/json",
    503: "The broker is unreachable. Try again",
}


def openapi() -> dict[str, Any]:
    """Return the document, by OpenAPI 3.1."""
    job = {
        "name": "job_id", "in": "path", "required": True, "description": "The id of the job",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"},
    }  # fmt: skip
    one = f"{BASE}/jobs/{{job_id}}"
    return {
        "openapi": "3.1.0",
        "info": {"title": "ssvm-worker", "version": str(CONTRACT_VERSION)},
        "security": [{"token": []}],
        "paths": {
            f"{BASE}/jobs": {
                "get": _operation("listJobs", "List jobs, the newest first", "jobs", 400) | {"parameters": _filters()},
                "post": _operation(
                    "submitJob", "Queue a job. Safe to repeat with a job_id", "record", 400, 409, 413, 415
                )
                | {"requestBody": {"required": True, "content": {"application/json": {"schema": _submission()}}}},
            },
            one: {"get": _operation("getJob", "Return the record of a job", "record", 404), "parameters": [job]},
            f"{one}/retry": {
                "post": _operation("retryJob", "Queue a failed or cancelled job again", "record", 404, 409),
                "parameters": [job],
            },
            f"{one}/cancel": {
                "post": _operation("cancelJob", "Cancel a job that has not ended", "record", 404, 409),
                "parameters": [job],
            },
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": _components(),
        },
    }


def _operation(name: str, summary: str, result: str, *statuses: int) -> dict[str, Any]:
    """Return an operation that answers with a document of the schema *result*, or with one of these errors."""
    content = {"application/json": {"schema": {"$ref": _COMPONENTS + result}}}
    problem = {"application/problem+json": {"schema": {"$ref": f"{_COMPONENTS}problem"}}}
    responses: dict[str, Any] = {"200": {"description": "Done", "content": content}}
    if name == "submitJob":
        responses["200"]["description"] = "The job exists already, with the same request"
        responses["201"] = {
            "description": "The job is queued",
            "content": content,
            "headers": {"Location": {"schema": {"type": "string"}}},
        }
    for status in sorted({*statuses, 401, 405, 503}):
        responses[str(status)] = {"description": _ERRORS[status], "content": problem}
    return {"operationId": name, "summary": summary, "responses": responses}


def _filters() -> list[dict[str, Any]]:
    text: dict[str, Any] = {"type": "string"}
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "state": ("Jobs in this state", text | {"enum": [*STATES]}),
        "zone": ("Jobs of this zone", text),
        "lane": ("Jobs of this lane", text | {"enum": [*LANES, INBOUND, HELD]}),
        "job": ("Jobs of this kind", text),
        "account": ("Jobs of this account", text),
        "error": ("Jobs with this error, such as StoreFull", text),
        "limit": (
            "The most jobs of the answer",
            {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 50},
        ),
        "offset": ("Skip these jobs", {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET, "default": 0}),
    }
    return [{"name": name, "in": "query", "description": note, "schema": form} for name, (note, form) in known.items()]


def _submission() -> dict[str, Any]:
    """Return the schema of a submission: the name of a job, its request, and the zone."""
    zone = {"type": "string", "pattern": f"^{ZONE}$", "description": "Default: the zone of the service"}
    kinds = [
        {
            "type": "object",
            "required": ["job", "request"],
            "additionalProperties": False,
            "properties": {
                "schema": {"const": CONTRACT_VERSION},
                "job": {"const": name},
                "zone": zone,
                "request": {"$ref": f"{_COMPONENTS}{name}.request"},
            },
        }
        for name in JOBS
    ]
    return {"oneOf": kinds}


def _components() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, schema in schemas().items():
        if name in ("callback", "event", "message"):
            continue
        found |= {inner: _local(each) for inner, each in schema.get("$defs", {}).items()}
        found[name] = _local({key: each for key, each in schema.items() if key not in ("$schema", "$id", "$defs")})
    texts = ("type", "title", "detail", "problem", "object", "remedy")
    found["problem"] = {
        "description": "An error (RFC 9457): the problem, the object that has it, and what to do.",
        "type": "object",
        "required": [*texts, "status", "retryable"],
        "properties": {name: {"type": "string"} for name in texts}
        | {"status": {"type": "integer"}, "retryable": {"type": "boolean"}},
    }
    found["jobs"] = {
        "type": "object",
        "required": ["schema", "jobs", "more"],
        "properties": {
            "schema": {"const": CONTRACT_VERSION},
            "jobs": {"type": "array", "items": {"$ref": f"{_COMPONENTS}record"}},
            "more": {"type": "boolean", "description": "Whether more jobs match: raise offset"},
        },
    }
    return found


def _local(schema: Any) -> Any:
    """Return the schema with its references as those of the components."""
    if isinstance(schema, list):
        return [_local(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _local(each) for name, each in schema.items()}
    if isinstance(target := found.get("$ref"), str):
        found["$ref"] = _COMPONENTS + target.removeprefix("#/$defs/").removeprefix(identity(""))
    return found
