"""How a download is asked for."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ssvm_worker.digest import is_checksum_url, parse_checksum
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.formats import parse_format

from .request import ArtifactRequest, QuotaField


class Request(ArtifactRequest):
    """An image to fetch."""

    url: str = Field(description="http(s), ftp, sftp, s3, and file or store where allowed; no password in it")
    kind: Literal["template", "iso", "volume"] = "template"
    name: str = Field("", max_length=255, description="What people call it; goes into the properties file")
    format: str = Field("auto", description="auto, or what the image must be: qcow2 vmdk ova vhd vhdx raw iso")
    checksum: str | None = Field(None, description="sha256:HEX, {SHA-256}HEX, a bare digest, or a SHA256SUMS URL")
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")
    max_bytes: int | None = Field(None, gt=0, description="Refuse a larger file")
    headers: dict[str, str] = Field(default_factory=dict, description="Sent to the URL's own origin only")
    credentials: str | None = Field(None, description="Name of credentials in the settings")
    convert_to: Literal["qcow2", "raw", "vmdk"] | None = Field(None, description="Store it in this format")
    mirrors: list[str] = Field(default_factory=list, max_length=20, description="Other URLs of the same file")
    quota: QuotaField = None
    max_rate: int | None = Field(None, gt=0, description="Bytes a second at the most")

    def uses(self, zone: str) -> tuple[str, ...]:
        """Also the host that it is fetched from."""
        found = super().uses(zone)
        with suppress(ValueError):  # the job itself will say what is wrong with its URL
            found += (f"source:{host}",) if (host := urlsplit(self.url).hostname) else ()
        return found

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        try:
            return parse_format(value)
        except InvalidRequest as error:
            raise ValueError(str(error)) from error

    @field_validator("name")
    @classmethod
    def _no_path(cls, value: str) -> str:
        if not value.isprintable() or set(value) & set("/\\") or value.startswith("."):
            raise ValueError("may not begin with a dot, nor hold slashes or control characters")
        return value

    @field_validator("checksum")
    @classmethod
    def _known_form(cls, value: str | None) -> str | None:
        if value is not None and not is_checksum_url(value):
            try:
                parse_checksum(value)
            except InvalidRequest as error:
                raise ValueError(str(error)) from error
        return value
