"""What every request has, and how one is read: all that is wrong is said at once, before anything is touched."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ssvm_worker.artifacts.layout import Artifact, check_key, check_name
from ssvm_worker.config.findings import describe, path_of
from ssvm_worker.errors import InvalidRequest, WorkerError, misused
from ssvm_worker.net.urls import check_headers, parse
from ssvm_worker.units import parse_rate, parse_size, printable

R = TypeVar("R", bound="JobRequest")
#: Job ids come from callers and stand in Redis keys and in names of part files.
_JOB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
#: No text of a request needs them: C0 but for the tab, DEL, and surrogates, which no UTF-8 can carry.
_UNFIT = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
#: Findings that an error tells, and unknown fields of a refused request whose names are kept.
_MOST_TOLD = 20
#: In place of what nobody may see.
MASK = "***"


class Privacy(enum.Enum):
    """What people may see of a field. Mark each field that may hold a secret, or whose name suggests it."""

    #: URLs without user, password and query; text that is no URL is shown.
    URL = "url"
    #: The names of an object, and none of its values.
    VALUES = "values"
    #: All of it: only its name suggests a secret.
    PUBLIC = "public"


#: Bytes of a request as JSON, and levels of objects and lists in it. Real requests have some hundred bytes in 3 levels.
MAX_BYTES, MAX_DEPTH = 256 * 1024, 32


class JobRequest(BaseModel):
    """The fields that every job's request has."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, coerce_numbers_to_str=True)

    job_id: str = Field("", description="The caller's idempotency key; made up when absent")
    callback_url: Annotated[str | None, Privacy.URL] = Field(
        None, description="Gets an HTTP POST of the job record when the job has ended"
    )
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

    @field_validator("*")
    @classmethod
    def _fit_text(cls, value: Any) -> Any:
        """Refuse text that cannot be written down, or that would be two lines where one is read."""
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else ()
        texts = [*value, *value.values()] if isinstance(value, dict) else texts
        if any(isinstance(each, str) and _UNFIT.search(each) for each in texts):
            raise ValueError("may not hold control characters, line breaks or lone surrogates")
        if isinstance(value, int) and value >= 1 << 63:
            raise ValueError("must be a smaller number")
        return value

    @field_validator("callback_url")
    @classmethod
    def _http_callback(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value, ("http", "https"))

    def uses(self, zone: str) -> tuple[str, ...]:
        """What the job shares with others, so that settings may limit how many run; a zone has stores of its own."""
        given = [getattr(self, name, None) or () for name in ("store", "source", "stores")]
        stores = [name for each in given for name in ([each] if isinstance(each, str) else each)]
        account = getattr(self, "account", "")
        shared = [f"store:{zone}/{name}" for name in dict.fromkeys(stores)]
        return tuple(shared + ([f"account:{account}"] if account else []))


def check_url(value: str, schemes: Sequence[str]) -> str:
    """Return a URL of one of these schemes that can be opened; ValueError does not repeat what is secret in it."""
    scheme = value.partition(":")[0].lower()
    if scheme not in schemes:
        shown = f"URLs of scheme {printable(scheme[:20])!r} are not taken" if ":" in value else "this is no URL"
        raise ValueError(f"{shown}; give one of: {', '.join(schemes)}")
    try:
        if scheme in ("http", "https"):
            parse(value)
        elif scheme in ("ftp", "sftp", "scp"):
            parse(value, (scheme,))
        elif "@" in urlsplit(value).netloc:
            raise ValueError("the URL holds a user name or password; name credentials of the settings instead")
        elif scheme == "s3" and not re.fullmatch("[sS]3://[^/]+/.+", value):
            raise ValueError("the URL names no object; give s3://BUCKET/KEY")
    except WorkerError as error:
        raise ValueError(f"{error.what}. {error.remedy}") from error
    return value


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
#: Bytes, and bytes a second: a number, or text with a unit.
Bytes = Annotated[int | None, BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)]
Rate = Annotated[int | None, BeforeValidator(lambda value: parse_rate(value) if isinstance(value, str) else value)]
#: A place on a store, below which artifacts are chosen.
Prefix = Annotated[
    str, AfterValidator(lambda value: (value.strip("/") and _as_value_error(check_key, value.strip("/"))) or value)
]
#: HTTP headers: their values are credentials as a rule.
Headers = Annotated[
    dict[str, str], Privacy.VALUES, AfterValidator(lambda value: _as_value_error(check_headers, value) or value)
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


def _as_value_error(check: Any, *args: Any) -> Any:
    try:
        return check(*args)
    except WorkerError as error:
        raise ValueError(str(error)) from error


def check_form(data: Any, where: str) -> None:
    """Raise InvalidRequest unless *data* is JSON of a limited size and depth, in strings that are valid Unicode.

    Python's json reads lone surrogates and any depth; Redis, Lua and other readers of a record do not.
    """
    depth, level = 0, [data]
    while level and depth <= MAX_DEPTH:
        depth += 1
        lists = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [child for each in lists for child in each]
    if level:
        what = f"The request is nested deeper than {MAX_DEPTH} levels"
        raise misused(InvalidRequest(what, where, "Send a flat object"))
    try:
        size = len(json.dumps(data, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError as error:
        what = f"The request has a lone surrogate, U+{ord(error.object[error.start]):04X}, which is no character"
        raise misused(InvalidRequest(what, where, "Send valid Unicode")) from None
    except (TypeError, ValueError) as error:
        raise misused(InvalidRequest(f"The request is not JSON: {error}", where, "Send one JSON object")) from None
    if size > MAX_BYTES:
        what = f"The request has {size} bytes; {MAX_BYTES} are allowed"
        raise misused(InvalidRequest(what, where, "Leave out what no job needs"))


def parse_request(model: type[R], data: Any, job: str) -> R:
    """Read a request object; InvalidRequest lists every finding, with the nearest right field for an unknown one."""
    if not isinstance(data, dict):
        raise misused(InvalidRequest("The request is not an object", job, f"See `ssvm schema {job}`"))
    check_form(data, f"{job} request")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)
        told = [describe(each, model.model_fields, path_of(each["loc"]) or "request") for each in found[:_MOST_TOLD]]
        told += [f"and {len(found) - _MOST_TOLD} more"] if len(found) > _MOST_TOLD else []
        what = "; ".join(told)
    except (ValueError, RecursionError):
        what = "The request is nested too deep, or has a number of more than 4300 digits"
    raise misused(InvalidRequest(what, f"{job} request", f"See `ssvm schema {job}`"))


def kept(model: type[JobRequest], data: Any) -> dict[str, Any]:
    """What may be written down of a refused request: known fields with right values, and the names of the others."""
    if not isinstance(data, dict):
        return {}
    try:
        check_form(data, "")
        model.model_validate(data)
        wrong: set[int | str] = set()
    except ValidationError as error:
        wrong = {each["loc"][0] for each in error.errors(include_url=False, include_input=False) if each["loc"]}
    except (InvalidRequest, ValueError, RecursionError):
        return {}
    right = {name: value for name, value in data.items() if name in model.model_fields and name not in wrong}
    others = [printable(str(name)[:60]) for name in data if name not in right]
    return right | dict.fromkeys(others[:_MOST_TOLD], MASK)


def redact(request: Any, model: type[JobRequest]) -> dict[str, Any]:
    """The request as people may see it; a field that the model does not know, or of a wrong type, is masked."""
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
    """A URL without user, password, query values or fragment; *** for text that cannot be taken apart."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    if not parts.netloc and "@" in parts.path:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, MASK if parts.query else "", ""))


def fingerprint(text: str) -> str:
    """A digest that tells two URLs apart without giving away what is secret in them."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
