"""Create the JSON Schemas of the documents that other programs send to us or receive from us.

The schemas of requests come from their pydantic models, all others from typed dictionaries. ``ssvm schema`` prints
them, and ``python -m docs.generate`` writes them to docs/reference/schemas/.
"""

# No `from __future__ import annotations`: `NotRequired` in a quoted annotation would not count.

import ast
import inspect
import textwrap
import threading
from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict

from ssvm_worker.artifacts.layout import ZONE
from ssvm_worker.config.schema import CONTRACT_VERSION, LANES
from ssvm_worker.jobs import JOBS, Job, results
from ssvm_worker.ledger.record import ENDED, HELD, INBOUND, STATES

#: Only one thread at a time may create syntax trees: CPython issue 106905 (SystemError in 3.11 and 3.12).
_PARSING = threading.Lock()
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
JobId = Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
JobName = Annotated[str, Field(pattern="^[a-z][a-z0-9._-]{0,63}$", examples=[*JOBS])]
Zone = Annotated[str, Field(pattern=f"^{ZONE}$")]
Lane = Annotated[str, Field(json_schema_extra={"enum": [*LANES, INBOUND, HELD]})]
State = Annotated[str, Field(json_schema_extra={"enum": [*STATES]})]
_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"
Time = Annotated[str, Field(pattern=_TIME, json_schema_extra={"format": "date-time"})]
Count = Annotated[int, Field(ge=0)]
Version = Annotated[int, Field(json_schema_extra={"const": CONTRACT_VERSION})]
TRACEPARENT = "^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"


class ErrorDocument(TypedDict):
    """Why a job or an attempt failed."""

    #: The class of the error: docs/reference/errors.md. Another name is an internal error of the worker.
    error: Annotated[str, Field(pattern=r"^\w+$")]
    #: The problem.
    what: str
    #: The object that has the problem, or an empty text.
    where: str
    #: What to do, or an empty text.
    remedy: str
    #: Whether the same request may succeed later.
    retryable: bool
    #: The three texts as one.
    message: str


class AttemptDocument(TypedDict):
    """One run of the job."""

    #: From 1.
    number: Annotated[int, Field(ge=1)]
    #: The name of the worker.
    worker: str
    #: The host of the worker.
    host: str
    #: The time of its begin.
    started: Time | None
    #: The time of its end, or null while it runs.
    ended: Time | None
    #: Why it failed, or null.
    error: ErrorDocument | None
    #: The bytes that it moved, as far as known.
    bytes: Count
    #: The user whose retry caused it.
    retried_by: NotRequired[str]


class ProgressDocument(TypedDict):
    """The progress of the last attempt."""

    #: What the attempt does.
    stage: str
    #: The bytes of the stage that are done.
    bytes: Count
    #: All bytes of the stage, or null if unknown.
    total: Count | None
    #: The average of the stage in bytes a second.
    rate: int
    #: The bytes of all stages.
    moved: Count


class DeliveryDocument(TypedDict):
    """The state of the callback."""

    #: Null while the job has not ended.
    state: Literal["pending", "delivered", "failed"] | None
    #: How often it was sent.
    tries: Count
    #: Why the last try failed, or null.
    error: str | None


class RecordDocument(TypedDict):
    """The record of a job."""

    #: The version of this contract.
    schema: Version
    #: The id of the job.
    job_id: JobId
    #: The name of the job. A refused message may have named a job that does not exist.
    job: JobName
    #: The zone whose workers run it.
    zone: Zone
    #: The lane that it waits in.
    lane: Lane
    #: succeeded, failed and cancelled are final until a user retries the job.
    state: State
    #: The last 20 attempts.
    attempts: list[AttemptDocument]
    #: Null before the first attempt.
    progress: ProgressDocument | None
    #: The result of a job that succeeded. A backup without a disk and a copy of a store have one too if they fail.
    result: dict[str, Any] | None
    #: The last error, or null.
    error: ErrorDocument | None
    #: The request without default values, and with secrets as ***.
    request: dict[str, Any]
    #: The time of the submission.
    created: Time | None
    #: The time of the last change.
    updated: Time | None
    #: The time of the next attempt, or null.
    not_before: Time | None
    #: The priority of the request.
    priority: Annotated[int, Field(ge=0, le=9)]
    #: The limit that delays a queued job, or null.
    waits_for: Annotated[str | None, Field(json_schema_extra={"pattern": "^(?:store|source|account|resource):"})]
    #: Whether a user has cancelled the job.
    cancel_requested: bool
    #: That user, or null.
    cancelled_by: str | None
    #: Null without a callback_url.
    callback: DeliveryDocument | None


class EventDocument(TypedDict):
    """One entry of the stream of events. All values are texts."""

    #: The version of this contract.
    schema: Annotated[str, Field(json_schema_extra={"const": str(CONTRACT_VERSION)})]
    #: The id of the job.
    job_id: JobId
    #: The name of the job.
    job: JobName
    #: The zone of the job.
    zone: Zone
    #: The lane of the job.
    lane: Lane
    #: The new state.
    state: State
    #: The number of the attempt, or an empty text before the first one.
    attempt: Annotated[str, Field(pattern="^[0-9]*$")]
    #: The time of the change in seconds since the epoch.
    at: Annotated[str, Field(pattern=r"^[0-9]+(?:\.[0-9]+)?$")]
    #: The result or the error of an ended job as JSON, else an empty text.
    outcome: Annotated[str, Field(json_schema_extra={"contentMediaType": "application/json"})]


def schemas() -> dict[str, dict[str, Any]]:
    """Return all schemas by name: ``download.request``, ``download.result``, …, record, callback, event, message."""
    found = {f"{job.name}.request": request_schema(job) for job in JOBS.values()}
    found |= {f"{name}.result": result_schema(name) for name in JOBS}
    return found | {name: make() for name, make in DOCUMENTS.items()}


def request_schema(job: Job) -> dict[str, Any]:
    """Return the schema of the requests of a job."""
    schema = job.Request.model_json_schema(schema_generator=_Generator)
    fields = schema["properties"]
    others = {other: fields[name] for other, name in job.Request.OTHER_NAMES.items()}
    names = dict(job.Request.OTHER_NAMES)
    if "stores" in fields and "store" not in fields:
        others["store"], names["store"] = {"type": "string"}, "stores"
    for other, name in names.items():
        fields[other] = others[other] | {"description": f"Accepted instead of {name}"}
        either = [{"required": [name]}, {"required": [other]}]
        if name in schema.get("required", ()):
            schema["required"].remove(name)
            rule: dict[str, Any] = {"oneOf": either}
        else:
            rule = {"not": {"allOf": either}}
        schema.setdefault("allOf", []).append(rule)
    version = {"const": CONTRACT_VERSION, "description": "The version of this contract"}
    return _named(f"{job.name}.request", schema | {"properties": {"schema": version} | fields})


def result_schema(name: str) -> dict[str, Any]:
    """Return the schema of the results of a job."""
    found = [_document(each) for each in results.RESULTS[name]]
    return _named(f"{name}.result", found[0] if len(found) == 1 else {"anyOf": found})


def record_schema() -> dict[str, Any]:
    """Return the schema of a record. It refers to the result of each job."""
    schema = _document(RecordDocument)
    schema["allOf"] = [
        {
            "if": {"properties": {"job": {"const": name}}},
            "then": {"properties": {"result": {"anyOf": [{"$ref": identity(f"{name}.result")}, {"type": "null"}]}}},
        }
        for name in JOBS
    ]
    return _named("record", schema)


def callback_schema() -> dict[str, Any]:
    """Return the schema of a callback's body: the record of a job that has ended."""
    schema = {"properties": {"state": {"enum": [*ENDED]}}, "$ref": identity("record")}
    return _named("callback", {"description": "The body of a callback: the record of a job that has ended."} | schema)


def event_schema() -> dict[str, Any]:
    """Return the schema of an entry in the stream of events."""
    return _named("event", _document(EventDocument))


def message_schema() -> dict[str, Any]:
    """Return the schema of a message in a Redis list. ``contentSchema`` describes its decoded body."""
    text = {"type": "string"}
    order = {"type": "object", "required": ["job_id"], "properties": {"job_id": text, "by": text | {"maxLength": 200}}}
    request = {"type": "object", "description": "The request of the job, or an order to retry or cancel a job"}
    arguments = {"type": "array", "minItems": 1, "maxItems": 1, "items": {"anyOf": [request, order, text]}}
    body = {"type": "array", "minItems": 3, "maxItems": 3, "prefixItems": [arguments, {"maxProperties": 0}, {}]}
    headers = {
        "lang": text,
        "task": {"enum": [*(f"ssvm.{name}" for name in JOBS), "ssvm.retry", "ssvm.cancel"]},
        "id": text | {"description": "The id of the job, unless its request has one"},
        "root_id": text,
        "traceparent": text | {"pattern": TRACEPARENT},
    }
    place = {
        "exchange": {"const": ""},
        "routing_key": text | {"pattern": rf"^ssvm\.{ZONE}\.(?:{'|'.join(LANES)})$"},
    }
    properties = {
        "body_encoding": {"const": "base64"},
        "correlation_id": text,
        "delivery_mode": {"type": "integer"},
        "delivery_tag": text,
        "delivery_info": _object(place, [*place]),
    }
    encoded = {"contentEncoding": "base64", "contentMediaType": "application/json", "contentSchema": body}
    parts = {
        "headers": _object(headers, ["task", "id"]),
        "properties": _object(properties, ["delivery_tag", "delivery_info", "body_encoding"]),
        "content-type": {"const": "application/json"},
        "content-encoding": text,
        "body": text | encoded,
    }
    about = {"description": "A message in the Redis list of a queue, by protocol 2 of Celery."}
    return _named("message", about | _object(parts, [*parts]))


def _object(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": fields}


#: The documents that are no requests and no results.
DOCUMENTS = {"record": record_schema, "callback": callback_schema, "event": event_schema, "message": message_schema}


def identity(name: str) -> str:
    """Return the ``$id`` of a schema."""
    return f"urn:ssvm:schema:{CONTRACT_VERSION}:{name}"


def _named(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    head = {"$schema": _DIALECT, "$id": identity(name), "title": name}
    return head | {key: value for key, value in schema.items() if key not in head}


def _document(model: Any) -> dict[str, Any]:
    """Return the schema of a typed dictionary, with its comments as descriptions."""
    return TypeAdapter(model).json_schema(schema_generator=_Generator)


class _Generator(GenerateJsonSchema):
    """Describes fields by their comments, and gives them no titles, which would repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the signature of pydantic
        return False

    def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
        made = super().typed_dict_schema(schema)
        for name, (_, text) in field_comments(schema["cls"]).items():
            made["properties"][name] |= {"description": text} if text else {}
        return made


@cache
def field_comments(cls: type) -> dict[str, tuple[str, str]]:
    """Return the annotation and the comment of each field of a class, in the order of the source."""
    with _PARSING:
        lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
        statements = ast.parse("\n".join(lines)).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node in statements:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#:"):
                first -= 1
            text = " ".join(each.strip().removeprefix("#:").strip() for each in lines[first : node.lineno - 1])
            found[ast.unparse(node.target)] = (ast.unparse(node.annotation), text)
    return found
