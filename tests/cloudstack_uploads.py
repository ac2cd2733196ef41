"""Browser uploads, as the management server of CloudStack prepares them and its web page sends them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from urllib3.filepost import encode_multipart_formdata

from ssvm_worker.wiring import assembly
from tests.servers.service import Service

KEY = "DXRxPr1SyDvldM0zk43"
UUID = "daf304f2-fa2d-4cd0-b3c0-368084cba94e"
STORE_URL = "nfs://192.0.2.11/export/sec2"
DIRECTORY = "211a4e01-cf68-3a99-9f57-f56c563748d4"


def connect_agent(service: Service) -> None:
    """Record what an agent records when its server sets it up."""
    web = assembly.open_cloudstack_web(service.settings)
    web.add_store(STORE_URL, DIRECTORY, "primary")
    web.set_upload_key(KEY)


def metadata(uuid: str = UUID, **given: Any) -> dict[str, Any]:
    fields = {
        "entityId": 217,
        "entityUUID": uuid,
        "absolutePath": "template/tmpl/1/217",
        "type": "TEMPLATE",
        "name": "217-1-8557f69b-535d-3c53-8c53-3f9c7a265ecb",
        "requiresHvm": False,
        "imageFormat": "RAW",
        "dataTo": STORE_URL,
        "dataToRole": "Image",
        "maxUploadSize": "50",
        "description": "up2",
        "defaultMaxSecondaryStorageInGB": -1,
        "processTimeout": 0,
        "accountId": 1,
        "zoneId": 1,
    }
    return {name: value for name, value in (fields | given).items() if value is not None}


def parameters(url: str, fields: dict[str, Any] | bytes, seconds: float = 600, key: str = KEY) -> dict[str, str]:
    """Return the headers that getUploadParamsForTemplate returns for that URL. *fields*: the metadata, or its JSON."""
    nonce, plain = os.urandom(12), fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    data = AESGCM(hashlib.sha256(key.encode()).digest()).encrypt(nonce, plain, None)
    encrypted = base64.b64encode(nonce + data).decode()
    expires = datetime.fromtimestamp(time.time() + seconds, UTC).isoformat(timespec="milliseconds")
    expires = expires.replace("+00:00", "Z")
    digest = hmac.new(key.encode(), f"{encrypted}{url}{expires}".encode(), hashlib.sha1).digest()
    return {"X-signature": base64.b64encode(digest).decode(), "X-metadata": encrypted, "X-expires": expires}


def signed(service: Service, uuid: str = UUID, seconds: float = 600, **given: Any) -> dict[str, str]:
    """Return the headers for an upload to the service."""
    return parameters(f"{service.url}/upload/{uuid}", metadata(uuid, **given), seconds)


def form(data: bytes, name: str = "disk.raw", **others: str) -> tuple[bytes, str]:
    """Return the body of a form with one file, and its type."""
    return encode_multipart_formdata([*others.items(), ("files[]", (name, data, "application/octet-stream"))])


def post(service: Service, data: bytes, headers: dict[str, str], uuid: str = UUID) -> Any:
    body, kind = form(data)
    return service.request("POST", f"/upload/{uuid}", body=body, headers=headers | {"Content-Type": kind})
