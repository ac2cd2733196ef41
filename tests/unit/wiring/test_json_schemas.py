"""The JSON Schemas of the contract: valid, complete, and as strict as the models that they come from."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs import JOBS, results
from ssvm_worker.jobs.request import parse_request, storable_fields
from ssvm_worker.wiring.json_schemas import schemas
from tests.documents import check_document, validator
from tests.neighbours import ROOT

ARTIFACT = {"account": "2", "id": "201"}
DOWNLOAD = {**ARTIFACT, "url": "https://host/image"}
BACKUP = {**ARTIFACT, "kind": "backup", "volume": "v"}
UPLOAD = {**ARTIFACT, "kind": "template"}
#: Fields of requests that both the model and the schema accept, and fields that both refuse.
REQUESTS: list[tuple[str, dict[str, Any], bool]] = [
    ("download", DOWNLOAD, True),
    ("download", {**DOWNLOAD, "schema": 1, "job_id": "a.b-c_1", "callback_url": "https://host/x"}, True),
    ("download", {**DOWNLOAD, "store": "archive", "format": "qcow2", "max_bytes": "10GiB", "quota": "500 GB"}, True),
    ("download", {**DOWNLOAD, "max_bytes": 5, "max_rate": "10MiB/s", "headers": {"X": "y"}, "priority": 9}, True),
    ("download", {**DOWNLOAD, "schema": 2}, False),
    ("download", {**DOWNLOAD, "schema": "1"}, False),
    ("download", {**DOWNLOAD, "job_id": ".a"}, False),
    ("download", {**DOWNLOAD, "job_id": "a" * 129}, False),
    ("download", {**DOWNLOAD, "callback_url": "ftp://host/x"}, False),
    ("download", {**DOWNLOAD, "store": "a", "stores": ["b"]}, False),
    ("download", {**DOWNLOAD, "stores": []}, False),
    ("download", {**DOWNLOAD, "format": "rwa"}, False),
    ("download", {**DOWNLOAD, "max_bytes": "10 apples"}, False),
    ("download", {**DOWNLOAD, "max_bytes": 0}, False),
    ("download", {**DOWNLOAD, "max_rate": "1/s/s"}, False),
    ("download", {**DOWNLOAD, "quota": "much"}, False),
    ("download", {**DOWNLOAD, "url": "gopher://host/x"}, False),
    ("download", {**DOWNLOAD, "account": "a/b"}, False),
    ("download", {**DOWNLOAD, "id": ""}, False),
    ("download", {**DOWNLOAD, "id": "x" * 181}, False),
    ("download", {**DOWNLOAD, "more": 1}, False),
    ("download", ARTIFACT, False),
    ("upload", {**UPLOAD, "url": "s3://b/k"}, True),
    ("upload", {**UPLOAD, "destination": "https://host/x"}, True),
    ("upload", {**BACKUP, "destination": "https://host/x", "fmt": "ova"}, True),
    ("upload", {**UPLOAD, "destination": "https://host/x", "url": "https://host/x"}, False),
    ("upload", {**UPLOAD, "destination": "file:///x"}, False),
    ("upload", UPLOAD, False),
    ("backup", {**BACKUP, "vcenter": "vc", "vm": "vm-1", "mode": "full"}, True),
    ("backup", {**BACKUP, "vcenter": "vc", "vm": "vm-1", "mode": "some"}, False),
    ("restore", {**BACKUP, "template": "t1", "format": "raw"}, True),
    ("copy", {**ARTIFACT, "stores": ["archive"]}, True),
    ("copy", {**ARTIFACT, "store": "archive", "parallel": 4}, True),
    ("copy", ARTIFACT, False),
    ("copy", {**ARTIFACT, "stores": ["archive"], "parallel": 65}, False),
    ("verify", {"sample": "5%", "rate": "50MiB/s"}, True),
    ("verify", {"sample": "5 %"}, False),
    ("verify", {"all": True, "rate": "fast"}, False),
    ("cleanup", {"older_than": "36h"}, True),
    ("cleanup", {"older_than": "36"}, False),
    ("delete", {**ARTIFACT, "store": "primary"}, True),
]


@pytest.mark.parametrize(("job", "request_", "valid"), REQUESTS)
def test_requests(job: str, request_: dict[str, Any], valid: bool) -> None:
    """The schema of a request refuses what the worker refuses, and accepts what it accepts."""
    try:
        parse_request(JOBS[job].Request, request_, job)
        accepted = True
    except InvalidRequest:
        accepted = False
    assert (accepted, validator(f"{job}.request").is_valid(request_)) == (valid, valid)


def test_the_version_is_not_stored() -> None:
    """A record keeps neither the version of a valid request nor that of a refused one."""
    model = JOBS["download"].Request
    assert "schema" not in parse_request(model, DOWNLOAD | {"schema": 1}, "download").model_dump()
    assert storable_fields(model, {"account": "2", "schema": 7, "more": 1}) == {"account": "2", "more": "***"}


def test_each_document_has_one() -> None:
    """Each request, result and other document has its own valid schema, with a version in its $id."""
    found = schemas()
    for name, schema in found.items():
        Draft202012Validator.check_schema(schema)
        assert schema["$id"] == f"urn:ssvm:schema:1:{name}"
    assert {each for given in results.RESULTS.values() for each in given} == {
        each for name, each in vars(results).items() if isinstance(each, type) and each.__module__ == results.__name__
    }
    assert found.keys() == {f"{job}.{kind}" for job in JOBS for kind in ("request", "result")} | {
        *("record", "callback", "event", "message")
    }


def test_the_documented_message() -> None:
    """The message in docs/reference/jobs.md fits its schema, and so does its body."""
    page = (ROOT / "docs/reference/jobs.md").read_text()
    message = json.loads(re.search(r"```json\n(\{\s+\"headers\".*?)```", page, re.S)[1])  # type: ignore[index]
    check_document("message", message)
    body = json.loads(base64.b64decode(message["body"]))
    content = schemas()["message"]["properties"]["body"]["contentSchema"]
    assert Draft202012Validator(content).is_valid(body)
    assert not Draft202012Validator(content).is_valid([[], {}, {}])
    check_document("delete.request", body[0][0])
