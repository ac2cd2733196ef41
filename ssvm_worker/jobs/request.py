"""The base of all requests. A request is validated before the job starts, and one error lists all findings."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from ssvm_worker.artifacts.layout import MAX_NAME, NAME, Artifact, check_key, check_name
from ssvm_worker.config.findings import describe, path_of
from ssvm_worker.config.schema import CONTRACT_VERSION
from ssvm_worker.errors import InvalidRequest, WorkerError, misused
from ssvm_worker.net.urls import check_headers, parse
from ssvm_worker.units import RATE, SIZE, parse_rate, parse_size, printable

R = TypeVar("R", bound="JobRequest")
#: Job ids come from callers. They become part of Redis keys and of names of part files.
_JOB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
#: Characters that no text of a request needs: C0 without the tab, DEL, and surrogates, which UTF-8 cannot encode.
_FORBIDDEN = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
#: The most findings in an error, and the most unknown field names that the record of a refused request keeps.
_MAX_FINDINGS = 20
#: Replaces text that users must not see.

MASK = "***"


class Privacy(enum.Enum):
    """What users may see of a field. Mark each field that may hold a secret, or whose name suggests one."""

    #: Show URLs without user, password and query. Show text that is not a URL.
    URL = "url"
    #: Show the names of an object, and mask its values.
    VALUES = "values"
    #: Show the field. Only its name suggests a secret.
    PUBLIC = "public"


#: The limits of a request: bytes as JSON, and levels of objects and lists. Real ones have some 100 bytes in 3 levels.
MAX_BYTES, MAX_DEPTH = 256 * 1024, 32


def url_form(*schemes: str) -> dict[str, JsonValue]:
    """Return the part of a JSON Schema for a URL of one of these schemes."""
    return {"format": "uri", "pattern": f"^(?:{'|'.join(schemes)}):"}


class JobRequest(BaseModel):
    """The fields that all requests have."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, coerce_numbers_to_str=True)
    #: Names that are accepted instead of fields.
    OTHER_NAMES: ClassVar[dict[str, str]] = {}

    job_id: str = Field(
        "",
        description="The caller's idempotency key: 1 to 128 letters, digits and . _ -. Generated if absent",
        json_schema_extra={"pattern": f"^(?:{_JOB_ID.pattern})?$"},
    )
    callback_url: Annotated[str | None, Privacy.URL] = Field(
        None,
        description="Receives the job record by HTTP POST when the job has ended",
        json_schema_extra=url_form("http", "https"),
    )
    priority: int = Field(0, ge=0, le=9, description="The lane runs queued jobs with priority 9 first")

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, values: Any) -> Any:
        """Accept ``schema``, the version of the contract. It is no field, so the record does not keep it."""
        if not isinstance(values, dict) or "schema" not in values:
            return values
        if values["schema"] != CONTRACT_VERSION:
            raise ValueError(f"schema: must be {CONTRACT_VERSION}, the version that this worker knows")
        return {name: each for name, each in values.items() if name != "schema"}

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, values: Any) -> Any:
        for other, name in cls.OTHER_NAMES.items():
            if isinstance(values, dict) and other in values and name not in values:
                values = {key: value for key, value in values.items() if key != other} | {name: values[other]}
        return values

    @model_validator(mode="before")
    @classmethod
    def _one_store(cls, values: Any) -> Any:
        """Accept ``store`` instead of ``stores``, if the request has no field ``store``."""
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

    @field_validator("*")
    @classmethod
    def _fit_text(cls, value: Any) -> Any:
        """Refuse text that UTF-8 cannot encode, control characters and line breaks, and integers above 63 bits."""
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else ()
        texts = [*value, *value.values()] if isinstance(value, dict) else texts
        if any(isinstance(each, str) and _FORBIDDEN.search(each) for each in texts):
            raise ValueError("may not hold control characters, line breaks or lone surrogates")
        if isinstance(value, int) and value >= 1 << 63:
            raise ValueError("must be a smaller number")
        return value

    @field_validator("callback_url")
    @classmethod
    def _http_callback(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value, ("http", "https"))

    def uses(self, zone: str) -> tuple[str, ...]:
        """Return the shared resources that the job uses. The settings may limit the running jobs of each of them.

        Stores of the same name in two zones are two resources.
        """
        given = [getattr(self, name, None) or () for name in ("store", "source", "stores")]
        stores = [name for each in given for name in ([each] if isinstance(each, str) else each)]
        account = getattr(self, "account", "")
        shared = [f"store:{zone}/{name}" for name in dict.fromkeys(stores)]
        return tuple(shared + ([f"account:{account}"] if account else []))


def check_url(value: str, schemes: Sequence[str]) -> str:
    """Return the URL. Raise ValueError if it is invalid or has another scheme. The message shows no secrets."""
    scheme = value.partition(":")[0].lower()
    if scheme not in schemes:
        shown = f"URLs of scheme {printable(scheme[:20])!r} are not accepted" if ":" in value else "this is not a URL"
        raise ValueError(f"{shown}; give one of: {', '.join(schemes)}")
    try:
        if scheme in ("http", "https"):
            parse(value)
        elif scheme in ("ftp", "sftp", "scp"):
            parse(value, (scheme,))
        elif "@" in urlsplit(value).netloc:
            raise ValueError("the URL has a user name or password; name credentials of the settings instead")
        elif scheme == "s3" and not re.fullmatch("[sS]3://[^/]+/.+", value):
            raise ValueError("the URL names no object; give s3://BUCKET/KEY")
    except WorkerError as error:
        raise ValueError(f"{error.what}. {error.remedy}") from error
    return value


def _check_size(value: str | None) -> str | None:
    """Validate bytes with a unit."""
    if value is not None:
        parse_size(value)
    return value


#: The quota field of jobs that store something for an account.
QuotaField = Annotated[
    str | None,
    Field(
        description="The account's quota, such as 500GiB. The settings' limit if absent",
        json_schema_extra={"pattern": SIZE},
    ),
    AfterValidator(_check_size),
]
#: Bytes, and bytes per second: a number, or text with a unit.
Bytes = Annotated[
    int | None,
    BeforeValidator(
        lambda value: parse_size(value) if isinstance(value, str) else value,
        json_schema_input_type=Annotated[int, Field(gt=0)] | Annotated[str, Field(pattern=SIZE)] | None,
    ),
]
Rate = Annotated[
    int | None,
    BeforeValidator(
        lambda value: parse_rate(value) if isinstance(value, str) else value,
        json_schema_input_type=Annotated[int, Field(gt=0)] | Annotated[str, Field(pattern=RATE)] | None,
    ),
]
#: A prefix on a store. The job chooses artifacts below it.
Prefix = Annotated[
    str, AfterValidator(lambda value: (value.strip("/") and _as_value_error(check_key, value.strip("/"))) or value)
]
#: HTTP headers. Their values are usually credentials.
Headers = Annotated[
    dict[str, str], Privacy.VALUES, AfterValidator(lambda value: _as_value_error(check_headers, value) or value)
]


#: The JSON Schema of names in keys, required and optional.
NAME_FORM: dict[str, JsonValue] = {"pattern": f"^{NAME}$", "maxLength": MAX_NAME}
OPTIONAL_NAME_FORM: dict[str, JsonValue] = {"pattern": f"^(?:{NAME})?$", "maxLength": MAX_NAME}


class ArtifactRequest(JobRequest):
    """A request for one artifact."""

    kind: Literal["template", "iso", "volume", "backup"] = Field("template", description="The kind of the artifact")
    account: str = Field(description="The account that owns the artifact", json_schema_extra=NAME_FORM)
    id: str = Field(description="The artifact's id within its account (and volume)", json_schema_extra=NAME_FORM)
    volume: str = Field(
        "", description="Backups only: the volume or VM of the snapshot", json_schema_extra=OPTIONAL_NAME_FORM
    )

    @field_validator("account", "id", "volume")
    @classmethod
    def _safe_names(cls, value: str, info: Any) -> str:
        if not (info.field_name == "volume" and not value):
            _as_value_error(check_name, value, info.field_name)
        return value

    @property
    def artifact(self) -> Artifact:
        """Return the artifact that the request names."""
        return Artifact(self.kind, self.account, self.id, self.volume)


def _as_value_error(check: Any, *args: Any) -> Any:
    try:
        return check(*args)
    except WorkerError as error:
        raise ValueError(str(error)) from error


def check_form(data: Any, location: str) -> None:
    """Raise InvalidRequest unless *data* is JSON of a limited size and depth with valid Unicode.

    Python's json accepts lone surrogates and any depth. Redis, Lua and other readers of a record do not.
    """
    depth, level = 0, [data]
    while level and depth <= MAX_DEPTH:
        depth += 1
        lists = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [child for each in lists for child in each]
    if level:
        what = f"The request is nested deeper than {MAX_DEPTH} levels"
        raise misused(InvalidRequest(what, location, "Send a flat object"))
    try:
        size = len(json.dumps(data, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError as error:
        what = f"The request has a lone surrogate, U+{ord(error.object[error.start]):04X}, which is not a character"
        raise misused(InvalidRequest(what, location, "Send valid Unicode")) from None
    except (TypeError, ValueError) as error:
        raise misused(InvalidRequest(f"The request is not JSON: {error}", location, "Send one JSON object")) from None
    if size > MAX_BYTES:
        what = f"The request has {size} bytes; {MAX_BYTES} are allowed"
        raise misused(InvalidRequest(what, location, "Remove fields that no job needs"))


def parse_request(model: type[R], data: Any, job: str) -> R:
    """Return the validated request, or raise InvalidRequest with a list of all findings.

    For an unknown field the error names the valid field with the most similar name.
    """
    if not isinstance(data, dict):
        raise misused(InvalidRequest("The request is not an object", job, f"See `ssvm schema {job}`"))
    check_form(data, f"{job} request")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        shown, rest = found[:_MAX_FINDINGS], len(found) - _MAX_FINDINGS
        findings = [describe(each, model.model_fields, path_of(each["loc"]) or "request") for each in shown]
        what = "; ".join([*findings, f"and {rest} more"] if rest > 0 else findings)
    except (ValueError, RecursionError):
        what = "The request is nested too deeply, or has a number of more than 4300 digits"
    raise misused(InvalidRequest(what, f"{job} request", f"See `ssvm schema {job}`"))


def storable_fields(model: type[JobRequest], data: Any) -> dict[str, Any]:
    """Return the part of a refused request that the ledger may store.

    This part is the known fields with valid values, and the masked names of the other fields.
    """
    if not isinstance(data, dict):
        return {}
    try:
        check_form(data, "")
        model.model_validate(data)
        invalid: set[int | str] = set()
    except ValidationError as error:
        invalid = {each["loc"][0] for each in error.errors(include_url=False, include_input=False) if each["loc"]}
    except (InvalidRequest, ValueError, RecursionError):
        return {}
    valid = {name: value for name, value in data.items() if name in model.model_fields and name not in invalid}
    others = [printable(str(name)[:60]) for name in data if name not in valid and name != "schema"]
    return valid | dict.fromkeys(others[:_MAX_FINDINGS], MASK)


def redact(request: Any, model: type[JobRequest]) -> dict[str, Any]:
    """Return the request as users may see it. Mask unknown fields, and private fields of a wrong type."""
    if not isinstance(request, dict):
        return {}
    return {name: _shown(model, name, value) for name, value in request.items()}


def _shown(model: type[JobRequest], name: str, value: Any) -> Any:
    if name not in model.model_fields:
        return MASK
    privacy = next((each for each in model.model_fields[name].metadata if isinstance(each, Privacy)), Privacy.PUBLIC)
    if privacy is Privacy.PUBLIC or value is None:
        return value
    if privacy is Privacy.URL and isinstance(value, str):
        return safe_url(value)
    if privacy is Privacy.URL and isinstance(value, list):
        return [safe_url(each) if isinstance(each, str) else MASK for each in value]
    return dict.fromkeys(value, MASK) if privacy is Privacy.VALUES and isinstance(value, dict) else MASK


def safe_url(url: str) -> str:
    """Return a URL without user, password, query values and fragment. Return *** for an invalid URL."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    if not parts.netloc and "@" in parts.path:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, MASK if parts.query else "", ""))


def fingerprint(text: str) -> str:
    """Return a digest that identifies a URL without showing its secrets."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
