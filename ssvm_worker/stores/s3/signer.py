"""Signature version 4 of bodies that know their SHA-256: a part is hashed once, not again by the SDK at each try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PLAIN = "s3v4"
#: Our signer in the SDK's own list, by a name of ours.
_OURS = "ssvm-s3v4"


class _DigestKnown(S3SigV4Auth):
    def payload(self, request: Any) -> str:
        digest: bytes | None = getattr(request.body, "sha256", None)
        return digest.hex() if digest else str(super().payload(request))


def _choose(signature_version: Any, **_: Any) -> Any:
    """Ours in place of the plain one only: what is presigned or not signed at all stays so."""
    return _OURS if signature_version == _PLAIN else None


AUTH_TYPE_MAPS[_OURS] = _DigestKnown


def sign_by_known_digest(client: S3Client) -> None:
    """Make the client sign the bodies of objects and parts so."""
    for call in ("PutObject", "UploadPart"):
        client.meta.events.register(f"choose-signer.s3.{call}", _choose)
