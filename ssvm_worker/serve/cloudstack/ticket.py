"""Decode the parameters of a browser upload, which the management server has encrypted and signed.

A user asks the management server for an upload (getUploadParamsForTemplate, …ForVolume). It returns a URL, and three
values that the browser sends as headers. Both sides know a key, which the server sends in SecStorageSetupCommand.

    X-metadata   Base64 of a nonce of 12 bytes, AES-256-GCM ciphertext and tag. Its key is the SHA-256 of the key
    X-signature  Base64 of HMAC-SHA1 over metadata, URL and expiry
    X-expires    the time until which the upload must begin, as ISO 8601

The facts come from parameters that CloudStack 4.23 returned; ``tests/data/cloudstack`` has them. Versions before 4.18
encrypt in another way and are refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.units import GiB, KiB

#: The longest accepted metadata. A description has at most 4096 characters.
_MAX_METADATA = 32 * KiB
_NONCE_BYTES = 12
_UUID = re.compile("[0-9A-Za-z-]{1,64}")
_ASK_AGAIN = "Ask the management server for new upload parameters"


@dataclass(frozen=True)
class UploadPermit:
    """A valid permission to upload one file."""

    #: The template's or volume's UUID in CloudStack.
    uuid: str
    #: The place of the artifact.
    prefix: str
    #: URL of the image store, as the management server names it.
    store_url: str
    #: Seconds since the epoch.
    until: int
    #: The fields of the metadata.
    fields: Mapping[str, Any]

    @property
    def max_bytes(self) -> int | None:
        """Return the largest accepted size of the file."""
        given = self.fields.get("maxUploadSize")
        return int(given) * GiB if given is not None and int(given) > 0 else None

    @property
    def quota(self) -> str | None:
        """Return the secondary storage limit of the account in bytes, as text."""
        given = int(self.fields.get("defaultMaxSecondaryStorageInGB") or -1)
        return str(given * GiB) if given > 0 else None

    def request(self, store: str) -> dict[str, Any]:
        """Return the request of the download job that stores the file."""
        artifact = Artifact.of_prefix(self.prefix)
        image_format = str(self.fields.get("imageFormat") or "auto").lower()
        kind = "iso" if image_format == "iso" and artifact.kind == "template" else artifact.kind
        values = {
            "url": f"upload:{self.uuid}",
            "kind": kind,
            "account": artifact.account,
            "id": artifact.id,
            "name": _as_name(str(self.fields.get("description") or "")),
            "unique_name": str(self.fields.get("name") or artifact.id),
            "keep_package": True,
            "format": image_format,
            "checksum": self.fields.get("checksum") or None,
            "stores": [store],
            "max_bytes": self.max_bytes,
            "quota": self.quota,
        }
        return {name: value for name, value in values.items() if value not in (None, "")}


def read_ticket(key: str, uuid: str, headers: Mapping[str, str], urls: Sequence[str], now: float) -> UploadPermit:
    """Return the permission in these headers, whose names are in lower case.

    *urls*: the URLs at which the client may have sent the request. A proxy hides which one it was. One of them must
    have been signed. Raises InvalidRequest for everything that is wrong.
    """
    if not _UUID.fullmatch(uuid):  # it becomes the id of a job, which is in keys and in names of files
        raise InvalidRequest("The upload has no valid UUID", ascii(uuid[:64]), _ASK_AGAIN)
    names = ("x-signature", "x-metadata", "x-expires")
    signature, metadata, expires = (headers.get(name, "") for name in names)
    if not (signature and metadata and expires):
        missing = ", ".join(name for name in names if not headers.get(name))
        raise InvalidRequest(f"The request lacks the headers {missing}", uuid, _ASK_AGAIN)
    if len(metadata) > _MAX_METADATA:
        raise InvalidRequest("The metadata is too long", uuid, _ASK_AGAIN)
    valid = [hmac.compare_digest(_sign(key, f"{metadata}{url}{expires}"), signature.encode()) for url in urls]
    if not any(valid):
        raise InvalidRequest("The signature is not valid for this URL", uuid, _ASK_AGAIN)
    until = _moment(expires)
    if until <= now:
        raise InvalidRequest("The upload URL has expired", uuid, _ASK_AGAIN)
    fields = _decrypt(key, metadata, uuid)
    if fields.get("entityUUID") != uuid:
        raise InvalidRequest("The metadata is about another upload", uuid, _ASK_AGAIN)
    try:
        ticket = UploadPermit(uuid, str(fields["absolutePath"]).strip("/"), str(fields["dataTo"]), until, fields)
        Artifact.of_prefix(ticket.prefix)
        _ = ticket.max_bytes, ticket.quota
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidRequest(f"The metadata is incomplete: {type(error).__name__}", uuid, _ASK_AGAIN) from error
    return ticket


def _as_name(description: str) -> str:
    """Return a description without characters that a name may not have."""
    return "".join(each if each.isprintable() and each not in "/\\" else "_" for each in description)[:255].lstrip(".")


def _sign(key: str, text: str) -> bytes:
    # The protocol prescribes SHA-1. HMAC does not need a hash function without collisions (RFC 6151, RFC 2104).
    return base64.b64encode(hmac.new(key.encode(), text.encode(), hashlib.sha1).digest())


def _moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError) as error:
        raise InvalidRequest("The expiry is not a time in ISO 8601", ascii(text[:40]), _ASK_AGAIN) from error


def _decrypt(key: str, metadata: str, uuid: str) -> dict[str, Any]:
    try:
        data = base64.b64decode(metadata, validate=True)
        plain = AESGCM(hashlib.sha256(key.encode()).digest()).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], None)
        fields = json.loads(plain)
    except (ValueError, InvalidTag, RecursionError) as error:
        what = "The metadata cannot be decrypted"
        raise InvalidRequest(what, uuid, "Use CloudStack 4.18 or later, and new upload parameters") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("The metadata is not an object", uuid, _ASK_AGAIN)
    return fields
