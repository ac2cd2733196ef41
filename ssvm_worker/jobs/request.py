"""What every request has, and how one is read: all that is wrong is said at once, before anything is touched."""

from __future__ import annotations

import difflib
import hashlib
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssvm_worker.errors import InvalidRequest, WorkerError, misused
from ssvm_worker.keys import Artifact, check_name
from ssvm_worker.units import parse_size

#: Job ids come from callers and stand in Redis keys and in names of part files.
R = TypeVar("R", bound="JobRequest")
_JOB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class JobRequest(BaseModel):
    """The fields that every job's request has."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, coerce_numbers_to_str=True)
    #: Fields whose values are secrets, wholly or in part; ``redact`` masks them.
    secret_fields: ClassVar[tuple[str, ...]] = ("callback_url", "url", "headers", "mirrors")

    job_id: str = Field("", description="The caller's idempotency key; made up when absent")
    callback_url: str | None = Field(None, description="Gets an HTTP POST of the job record when the job has ended")
    priority: int = Field(0, ge=0, le=9, description="9 is run first, of the jobs that wait in a lane")

    @model_validator(mode="before")
    @classmethod
    def _one_store(cls, values: Any) -> Any:
        """``store`` may stand for ``stores`` with one name in it, where a request has no other use for it."""
        has_one = "store" not in cls.model_fields and "stores" in cls.model_fields
        if has_one and isinstance(values, dict) and values.keys() & {"store", "stores"} == {"store"}:
            return {**{name: each for name, each in values.items() if name != "store"}, "stores": [values["store"]]}
        return values

    @field_validator("job_id")
    @classmethod
    def _safe_job_id(cls, value: str) -> str:
        if value and not _JOB_ID.fullmatch(value):
            raise ValueError("1 to 128 letters, digits and . _ - only, not beginning with a dot or a dash")
        return value

    @field_validator("callback_url")
    @classmethod
    def _http_callback(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError("must be an http(s) URL")
        return value

    def uses(self, zone: str) -> tuple[str, ...]:
        """What the job shares with others, so that settings may limit how many run; a zone has stores of its own."""
        given = [getattr(self, name, None) or () for name in ("store", "source", "stores")]
        stores = [name for each in given for name in ([each] if isinstance(each, str) else each)]
        account = getattr(self, "account", "")
        shared = [f"store:{zone}/{name}" for name in dict.fromkeys(stores)]
        return tuple(shared + ([f"account:{account}"] if account else []))


def check_size(value: str | None) -> str | None:
    """A validator of fields that hold bytes with a unit."""
    if value is not None:
        parse_size(value)
    return value


#: Of a job that stores something for an account.
QuotaField = Annotated[
    str | None,
    Field(description="Bytes that the account may have in all, as 500GiB; the settings' limit when absent"),
    AfterValidator(check_size),
]


class ArtifactRequest(JobRequest):
    """A request about one artifact."""

    kind: Literal["template", "iso", "volume", "backup"] = "template"
    account: str = Field(description="The account that owns the artifact")
    id: str = Field(description="The artifact's id within its account (and volume)")
    volume: str = Field("", description="Backups only: the volume or VM that the snapshot is of")

    @field_validator("account", "id", "volume")
    @classmethod
    def _safe_names(cls, value: str, info: Any) -> str:
        if not (info.field_name == "volume" and not value):
            _as_value_error(check_name, value, info.field_name)
        return value

    @property
    def artifact(self) -> Artifact:
        """The artifact that the request is about."""
        return Artifact(self.kind, self.account, self.id, self.volume)


def _as_value_error(check: Any, *args: Any) -> None:
    try:
        check(*args)
    except WorkerError as error:
        raise ValueError(str(error)) from error


def parse_request(model: type[R], data: Any, job: str) -> R:
    """Read a request object; InvalidRequest lists every finding, with the nearest right field for an unknown one."""
    if not isinstance(data, dict):
        raise misused(InvalidRequest("The request is not an object", job, f"See `ssvm schema {job}`"))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        findings = [_finding(each, model) for each in found]
        refused = InvalidRequest("; ".join(findings), f"{job} request", f"See `ssvm schema {job}`")
        raise (misused(refused) if any(map(_is_about_fields, found)) else refused) from None


def _is_about_fields(error: Any) -> bool:
    """Whether fields are missing, unknown, or do not go together; else the value of one is wrong."""
    return error["type"] in ("missing", "extra_forbidden") or not error["loc"]


def _finding(error: Any, model: type[BaseModel]) -> str:
    field = ".".join(str(each) for each in error["loc"]) or "request"
    if error["type"] == "missing":
        return f"{field}: missing"
    if error["type"] != "extra_forbidden":
        return f"{field}: {error['msg'].removeprefix('Value error, ')}"
    near = difflib.get_close_matches(field, list(model.model_fields), n=1, cutoff=0.5)
    return f"{field}: unknown" + (f", did you mean {near[0]}?" if near else "")


def redact(request: dict[str, Any]) -> dict[str, Any]:
    """The request as people may see it: header values and the queries of URLs are masked."""
    shown = dict(request)
    for name in JobRequest.secret_fields:
        value = shown.get(name)
        if isinstance(value, str):
            shown[name] = safe_url(value)
        elif isinstance(value, dict):
            shown[name] = dict.fromkeys(value, "***")
        elif isinstance(value, list):
            shown[name] = [safe_url(str(each)) for each in value]
    return shown


def safe_url(url: str) -> str:
    """A URL without user, password, query values or fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "***" if parts.query else "", ""))


def fingerprint(text: str) -> str:
    """A digest that tells two URLs apart without giving away what is secret in them."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
