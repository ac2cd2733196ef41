"""The HTTP API over real sockets: it works like the command line, refuses strangers, and fits its OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings, strategies

from ssvm_worker.errors import ConfigError
from ssvm_worker.wiring.assembly import open_ledger
from tests.documents import check_document
from tests.servers.service import Service

TOKEN = "a token of the management server"
DOWNLOAD = {"url": "https://host/image?key=sesame", "account": "2", "id": "201"}


@pytest.fixture
def api(start_service: Callable[..., Service]) -> Service:
    """A service with the API and one token."""
    return start_service(api=True, tokens={"mgmt": {"secret": TOKEN}})


def ask(api: Service, method: str, path: str, body: Any = None, token: str = TOKEN) -> tuple[int, Any]:
    """Return the status and the document of an answer."""
    given = {} if body is None else {"body": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    headers = given.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    answer = api.request(method, f"/api/v1{path}", headers=headers, **given)
    document = answer.json()
    assert answer.headers["Content-Type"] == f"application/{'problem+' if answer.status >= 400 else ''}json"
    return answer.status, document


def test_the_life_of_a_job(api: Service) -> None:
    """A job is submitted once, shown without secrets, listed, cancelled and retried under the name of the token."""
    submission = {"job": "download", "zone": "z", "request": DOWNLOAD | {"job_id": "j1", "schema": 1}}
    status, record = ask(api, "POST", "/jobs", submission)
    check_document("record", record)
    assert (status, record["state"], record["zone"]) == (201, "queued", "z")
    assert record["request"]["url"] == "https://host/image?***"
    assert ask(api, "POST", "/jobs", submission) == (200, record)
    assert ask(api, "GET", "/jobs/j1") == (200, record)
    assert ask(api, "POST", "/jobs", {"job": "cleanup", "request": {}})[0] == 201
    assert ask(api, "GET", "/jobs?account=2&state=queued&lane=download") == (
        200,
        {"schema": 1, "jobs": [record], "more": False},
    )
    assert ask(api, "GET", "/jobs?limit=1")[1]["more"] is True
    status, record = ask(api, "POST", "/jobs/j1/cancel")
    assert (status, record["state"], record["cancelled_by"]) == (200, "cancelled", "mgmt (api)")
    assert ask(api, "POST", "/jobs/j1/retry")[1]["state"] == "queued"
    with open_ledger(api.settings) as ledger:
        assert ledger.get("j1").attempts == ()


REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/jobs", {"job": "downlaod", "request": DOWNLOAD}, 400, "did you mean download"),
    ("POST", "/jobs", {"job": "download", "request": DOWNLOAD | {"acount": "2"}}, 400, "did you mean account"),
    ("POST", "/jobs", {"job": "download", "request": DOWNLOAD, "zone": "a zone"}, 400, "Invalid name of a zone"),
    ("POST", "/jobs", {"job": "download", "request": DOWNLOAD | {"job_id": "cs-1"}}, 400, "agent"),
    ("POST", "/jobs", {"job": "download", "request": DOWNLOAD | {"job_id": "known"}}, 409, "another request"),
    ("POST", "/jobs", {"job": "download", "request": DOWNLOAD, "schema": 2}, 400, "version"),
    ("POST", "/jobs", {"job": "download", "request": DOWNLOAD, "requests": {}}, 400, "did you mean request"),
    ("POST", "/jobs", {"job": "download"}, 400, "missing"),
    ("POST", "/jobs", ["download"], 400, "not an object"),
    ("POST", "/jobs", {"job": "download", "request": {"x": "y" * 300_000}}, 413, "bytes"),
    ("GET", "/jobs?states=failed", None, 400, "did you mean state"),
    ("GET", "/jobs?limit=501", None, 400, "range"),
    ("GET", "/jobs?state=done", None, 400, "Unknown value"),
    ("GET", "/jobs/none", None, 404, "no such job"),
    ("POST", "/jobs/none/retry", None, 404, "no such job"),
    ("POST", "/jobs/known/retry", None, 409, "only failed and cancelled"),
    ("DELETE", "/jobs", None, 405, "method"),
    ("GET", "/elsewhere", None, 404, "no such path"),
]


def test_refused(api: Service) -> None:
    """Each refusal is a problem document with the problem, the object and the remedy, and changes nothing."""
    ask(api, "POST", "/jobs", {"job": "cleanup", "request": {"job_id": "known"}})
    for method, path, body, expected, text in REFUSED:
        status, document = ask(api, method, path, body)
        assert (status, document["status"]) == (expected, expected), (path, body)
        assert text in document["problem"], (path, body)
        assert document["object"] or document["remedy"]
    assert len(ask(api, "GET", "/jobs")[1]["jobs"]) == 1


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x"])
def test_strangers(api: Service, token: str) -> None:
    """Without a known token every operation is refused, before its body is read."""
    for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/jobs/x"), ("POST", "/jobs/x/cancel")):
        status, document = ask(api, method, path, token=token)
        assert (status, document["title"]) == (401, "Unauthorized")
    assert api.request("GET", "/api/v1/jobs", headers={"Authorization": f"Basic {TOKEN}"}).status == 401


def test_off(start_service: Callable[..., Service]) -> None:
    """The API is off by default, and does not start without a token."""
    assert start_service().request("GET", "/api/v1/jobs").status == 404
    with pytest.raises(ConfigError, match=r"serve\.tokens"):
        start_service(api=True)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis(api: Service, mode: str) -> None:
    """Generated requests get the statuses and documents that the OpenAPI document names."""
    import schemathesis  # a slow import, and only one process runs this test
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    conforms = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_url(f"{api.url}/api/v1/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) == 5

    # The same examples in each run: a rare one must not fail the build of another change.
    @settings(max_examples=4, derandomize=True, database=None, phases=[Phase.generate])
    @given(strategies.data())
    def check(data: strategies.DataObject) -> None:
        for operation in operations:
            case = data.draw(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
            case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, checks=conforms)

    check()
