"""Requests of ``fetch``: only files of one volume's snapshots. tests/unit/cloudstack/test_web_story.py runs the job."""

from __future__ import annotations

from typing import Any

import pytest

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs.fetch.job import Request, resource
from ssvm_worker.jobs.request import parse_request

URL = "http://images.example/copy/5d6e.ovf"


def request(**fields: Any) -> Request:
    given = {"urls": [URL], "keys": ["snapshots/1/32/5d6e"], "store": "primary"}
    return parse_request(Request, given | fields, "fetch")


def test_resource() -> None:
    """One job at a time writes the snapshots of a volume, as backups do."""
    assert resource(request()) == "snapshots/1/32"


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": ["template/tmpl/1/2/x"]},
        {"keys": ["snapshots/1/32"]},
        {"keys": ["snapshots/1/32/a/b/c"]},
        {"keys": ["snapshots/1/../x"]},
        {"keys": ["snapshots/1/32/a", "snapshots/1/32/b"]},
        {"urls": [URL, URL], "keys": ["snapshots/1/32/a", "snapshots/1/32/a"]},
        {"urls": [URL, URL], "keys": ["snapshots/1/32/a", "snapshots/1/33/a"]},
        {"urls": ["file:///etc/passwd"]},
        {"urls": ["http://user:password@images.example/x"]},
        {"urls": [], "keys": []},
    ],
)
def test_refused(fields: dict[str, Any]) -> None:
    """Other keys, other schemes, and lists that do not match are refused."""
    with pytest.raises(InvalidRequest):
        request(**fields)
