"""Requests: any input is a valid request or an InvalidRequest, and its secrets are never shown."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker import sources
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import EXIT_USAGE, InvalidRequest
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.download import request as downloadrequest
from ssvm_worker.jobs.request import MASK, Privacy, parse_request, redact, safe_url, storable_fields
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring.assembly import new_job, shown

DOWNLOAD = JOBS["download"].Request
GOOD = {"url": "http://x/y", "account": "2", "id": "7"}
#: A text field with one of these words in its name may contain a secret.
SUSPICIOUS = re.compile("url|password|token|key|header|secret|checksum|credential|mirror|destination|cookie|auth")

TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    [
        "http://[x",
        "http://h:PORT/",
        "http://u:p@h/x",
        "s3://b/k",
        "file:///x",
        "http://h/\ud800",
        "a\nb",
        "\x1b[2J",
        "9" * 99,
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**4000) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("job", JOBS)
@given(data=st.data())
def test_whatever_is_sent(job: str, data: st.DataObject) -> None:
    """Any JSON value is a valid request, or an InvalidRequest with usage's status and a printable record."""
    model = JOBS[job].Request
    odd = data.draw(st.dictionaries(st.sampled_from(sorted(model.model_fields)) | TEXTS, VALUES, max_size=4) | VALUES)
    request = GOOD | odd if isinstance(odd, dict) else odd
    stored, uses, error = storable_fields(model, request), (), None
    try:
        new = new_job(Settings(), JOBS[job], request)
        stored, uses = new.request, new.uses
    except InvalidRequest as refused:
        error = refused
    assert error is None or error.exit_code == EXIT_USAGE
    str(error).encode()
    assert not any("\n" in each for each in uses)
    record = Record("j", job, "z", "l", "failed", stored)
    json.dumps(shown(record), ensure_ascii=True).encode()


def test_secret_fields_are_marked() -> None:
    """Each field with a name that suggests a secret declares what may be shown."""
    forgotten = [
        f"{job.name}.{name}"
        for job in JOBS.values()
        for name, field in job.Request.model_fields.items()
        if SUSPICIOUS.search(name) and not any(isinstance(each, Privacy) for each in field.metadata)
    ]
    assert forgotten == []


def test_schemes_of_downloads() -> None:
    """A request may use the schemes that have a source, and the upload sender."""
    assert set(downloadrequest.SCHEMES) == {*sources.SCHEMES, "upload"}


@pytest.mark.parametrize(
    ("job", "field", "value", "seen"),
    [
        ("download", "url", "https://h/x?sig=SECRET", "https://h/x?***"),
        ("download", "checksum", "https://u:SECRET@h/SUMS?token=SECRET", "https://h/SUMS?***"),
        ("download", "checksum", "sha256:00", "sha256:00"),
        ("download", "mirrors", ["ftp://u:SECRET@h/x", 5], ["ftp://h/x", MASK]),
        ("download", "headers", {"Authorization": "SECRET"}, {"Authorization": MASK}),
        ("download", "headers", ["Authorization: SECRET"], MASK),
        ("download", "callback_url", {"a": "SECRET"}, MASK),
        ("upload", "url", "http://[SECRET", MASK),
        ("upload", "url", "u:SECRET@h/x", MASK),
        ("upload", "destination", "https://u:SECRET@h/x", MASK),
        ("upload", "key", "template/tmpl/2/1/1.raw", "template/tmpl/2/1/1.raw"),
        ("delete", "password", "SECRET", MASK),
    ],
)
def test_redacted(job: str, field: str, value: Any, seen: Any) -> None:
    """The shown request has no user, password, query or header, and only the names of unknown fields."""
    assert redact({field: value}, JOBS[job].Request) == {field: seen}


def test_odd_requests_are_redacted() -> None:
    """A record whose request is not an object is shown without it."""
    assert redact(["SECRET"], DOWNLOAD) == {}


@given(TEXTS)
def test_safe_url_is_total(text: str) -> None:
    """The masking of a URL in an error succeeds for any text."""
    safe_url(text)
    safe_url(f"http://{text}")


REFUSED: list[Any] = [
    pytest.param({"url": "http://[SECRET"}, "url: The URL's host or port is malformed", id="no URL"),
    pytest.param({"url": "http://me:SECRET/x"}, "url: The URL's host or port is malformed", id="password for a port"),
    pytest.param({"url": "http://me:SECRET@h/x"}, "url: The URL has a user name", id="password"),
    pytest.param({"url": "s3://me:SECRET@b/x"}, "url: the URL has a user name", id="password of s3"),
    pytest.param({"mirrors": ["http://h:SECRET/"]}, "mirrors: The URL's host or port is malformed", id="mirror"),
    pytest.param({"checksum": "https://h:SECRET/SUMS"}, "checksum: The URL's host or port is malformed", id="checksum"),
    pytest.param({"checksum": "SECRET"}, "checksum: Checksum of an unknown form", id="no checksum"),
    pytest.param(
        {"callback_url": "http://h:SECRET/"}, "callback_url: The URL's host or port is malformed", id="callback"
    ),
    pytest.param({"callback_url": "ftp://SECRET"}, "callback_url: URLs of scheme 'ftp'", id="callback by ftp"),
    pytest.param({"headers": {"A": "SECRET\r\nB: c"}}, "headers: Invalid header", id="header"),
    pytest.param({"headers": ["SECRET"]}, "headers: must be an object", id="headers as a list"),
    pytest.param({"password": "SECRET"}, "password: unknown", id="unknown field"),
    pytest.param({"header": {"A": "SECRET"}}, "header: unknown, did you mean headers?", id="mistyped field"),
    pytest.param({"stores": ["a\nstore:z/b"]}, "stores: may not hold control characters", id="name of a store"),
    pytest.param({"url": "http://h/\ud800"}, "a lone surrogate, U+D800", id="lone surrogate"),
    pytest.param({"kind": "tmpl"}, "kind: must be one of template, iso, volume, did you mean template?", id="kind"),
    pytest.param({"max_rate": "fast"}, "max_rate: must be a number of bytes", id="rate"),
    pytest.param({"max_bytes": True and "9" * 400}, "max_bytes: must be", id="size without end"),
    pytest.param({"account": 10**5000}, "not JSON: Exceeds the limit", id="number without end"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_refused(fields: dict[str, Any], said: str) -> None:
    """A wrong value is refused before a job exists, and neither error nor record repeats a secret."""
    with pytest.raises(InvalidRequest) as caught:
        parse_request(DOWNLOAD, GOOD | fields, "download")
    assert said in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert "SECRET" not in f"{caught.value} {storable_fields(DOWNLOAD, GOOD | fields)}"


def test_kept_of_a_refused_request() -> None:
    """A refused request keeps valid values of known fields, and the names of all others."""
    request = GOOD | {"account": "a b", "nope\x1b": {"deep": 1}, "headers": {"A": "b"}}
    assert storable_fields(DOWNLOAD, request) == {
        "url": "http://x/y", "id": "7", "headers": {"A": "b"}, "account": MASK, "nope\\u001b": MASK
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "bytes_"), [("10MiB/s", 10 << 20), ("10M", 10 << 20), (5, 5), ("5", 5), ("1kB", 1000)]
)
def test_units(given: Any, bytes_: int) -> None:
    """Sizes and rates in a request have units, as on the command line."""
    request = parse_request(DOWNLOAD, GOOD | {"max_rate": given, "max_bytes": str(given).removesuffix("/s")}, "x")
    assert (request.max_rate, request.max_bytes) == (bytes_, bytes_)  # type: ignore[attr-defined]


@pytest.mark.parametrize("zone", ["a b", "a\nb", "x" * 65, "é"])
def test_zone(zone: str) -> None:
    """A job's zone must be a valid name in the settings, because others break the names of counters."""
    with pytest.raises(InvalidRequest, match="Invalid name of a zone"):
        new_job(Settings(), JOBS["download"], GOOD, zone=zone)
