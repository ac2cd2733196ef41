"""Uploads by link: the links, and the actions of a client."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from typing import Any

import pytest

from ssvm_worker.errors import ObjectNotFound
from ssvm_worker.ledger.links import PUT, Link, new_id
from ssvm_worker.ledger.record import Record
from ssvm_worker.wiring import assembly
from tests import images
from tests.servers.service import Service

IMAGE = images.mbr(6 << 20)
SHA256 = hashlib.sha256(IMAGE).hexdigest()
PREFIX = "template/tmpl/2/7"
TUS = {"Tus-Resumable": "1.0.0"}
PATCH = TUS | {"Content-Type": "application/offset+octet-stream"}


def upload_link(service: Service, seconds: int = 3600, **request: Any) -> Link:
    """A valid link."""
    link_id = new_id()
    values = {"url": f"upload:{link_id}", "account": "2", "id": "7", "kind": "template", "stores": ["primary"]}
    values |= request
    link = Link(link_id, PUT, int(time.time()) + seconds, "primary", f"template/tmpl/2/{values['id']}", values)
    assembly.open_links(service.settings).add(link)
    return link


def url_of(service: Service, link: Link) -> str:
    return assembly.link_signer(service.settings).sign(link.path, link.until)


@pytest.fixture
def link(service: Service) -> Link:
    """Return an upload link without conditions."""
    return upload_link(service)


@pytest.fixture
def at(service: Service, link: Link) -> str:
    """Return the URL of ``link``."""
    return url_of(service, link)


def record(service: Service, link: Link) -> Record:
    with assembly.open_ledger(service.settings) as ledger:
        return ledger.get(link.job_id)


def stored(service: Service) -> list[str]:
    """Return all files of the store, with hidden parts."""
    # walk ignores a directory that the service removes at the same time.
    return sorted(name for _, _, names in os.walk(service.store) for name in names)


def create(service: Service, at: str, length: int = len(IMAGE)) -> str:
    """Begin a tus upload, and return its URL."""
    answer = service.request("POST", at, headers=TUS | {"Upload-Length": str(length)})
    assert answer.status == 201
    return answer.headers["Location"]


def patch(service: Service, url: str, offset: int, data: bytes) -> Any:
    return service.request("PATCH", url, headers=PATCH | {"Upload-Offset": str(offset)}, body=data)


def offset_of(service: Service, url: str) -> int:
    answer = service.request("HEAD", url, headers=TUS)
    assert answer.status == 200
    return int(answer.headers["Upload-Offset"])


def begin_put(service: Service, at: str, data: bytes, length: int = len(IMAGE)) -> socket.socket:
    """Begin a PUT, and send *data*."""
    peer = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])))
    peer.sendall(f"PUT {at} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + data)
    return peer


def is_interrupted(service: Service, link: Link) -> bool:
    """Return whether an attempt has ended and the job waits for its sender."""
    # One record, because the job may start between two reads.
    seen = record(service, link) if state(service, link) else None
    return bool(seen and seen.state == "queued" and seen.attempts)


def state(service: Service, link: Link) -> str:
    try:
        return record(service, link).state
    except ObjectNotFound:
        return ""
