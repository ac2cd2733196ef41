"""How a download is asked for."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ssvm_worker.artifacts.checksums import is_checksum_url, parse_checksum
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.formats import parse_format
from ssvm_worker.jobs.request import ArtifactRequest, Bytes, Headers, Privacy, QuotaField, Rate, check_url

#: What a download may name; ``upload`` stands for the sender of `ssvm serve`. The settings may allow fewer.
SCHEMES = ("http", "https", "ftp", "sftp", "scp", "s3", "file", "store", "upload")


class Request(ArtifactRequest):
    """An image to fetch."""

    url: Annotated[str, Privacy.URL] = Field(
        description="http(s), ftp, sftp, s3, and file or store where allowed; no password in it"
    )
    kind: Literal["template", "iso", "volume"] = "template"
    name: str = Field("", max_length=255, description="What people call it; goes into the properties file")
    format: str = Field("auto", description="auto, or what the image must be: qcow2 vmdk ova vhd vhdx raw iso")
    checksum: Annotated[str | None, Privacy.URL] = Field(
        None, description="sha256:HEX, {SHA-256}HEX, a bare digest, or a SHA256SUMS URL"
    )
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")
    max_bytes: Bytes = Field(None, gt=0, description="Refuse a larger file: bytes, or 10GiB")
    headers: Headers = Field(default_factory=dict, description="Sent to the URL's own origin only")
    credentials: Annotated[str | None, Privacy.PUBLIC] = Field(None, description="Name of credentials in the settings")
    convert_to: Literal["qcow2", "raw", "vmdk"] | None = Field(None, description="Store it in this format")
    mirrors: Annotated[list[str], Privacy.URL] = Field(
        default_factory=list, max_length=20, description="Other URLs of the same file"
    )
    quota: QuotaField = None
    max_rate: Rate = Field(None, gt=0, description="Bytes a second at the most, or 10MiB/s")

    def uses(self, zone: str) -> tuple[str, ...]:
        """Also the host that it is fetched from."""
        host = urlsplit(self.url).hostname
        return super().uses(zone) + ((f"source:{host}",) if host else ())

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return check_url(value, SCHEMES)

    @field_validator("mirrors")
    @classmethod
    def _known_schemes(cls, value: list[str]) -> list[str]:
        return [check_url(each, SCHEMES) for each in value]

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
        if value is None:
            return value
        if is_checksum_url(value):
            return check_url(value, ("http", "https"))
        try:
            parse_checksum(value)
        except InvalidRequest as error:
            raise ValueError(f"{error.what}. {error.remedy}") from error
        return value
