"""The request of a download."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ssvm_worker.artifacts.checksums import is_checksum_url, parse_checksum
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.formats import NAMES, parse_format
from ssvm_worker.jobs.request import ArtifactRequest, Bytes, Headers, Privacy, QuotaField, Rate, check_url, url_form

#: The schemes of a download. ``upload`` means the client that sends a file to `ssvm serve`. The settings may allow
#: fewer schemes.
SCHEMES = ("http", "https", "ftp", "sftp", "scp", "s3", "file", "store", "upload")


class Request(ArtifactRequest):
    """The image to download and the stores that receive it."""

    url: Annotated[str, Privacy.URL] = Field(
        description="http(s), ftp, sftp, s3, or if allowed file or store. Without a password",
        json_schema_extra=url_form(*SCHEMES),
    )
    kind: Literal["template", "iso", "volume"] = Field("template", description="The kind of the artifact")
    name: str = Field("", max_length=255, description="The display name, for the properties file")
    format: str = Field("auto", description="auto, or the required format", json_schema_extra={"enum": [*NAMES]})
    checksum: Annotated[str | None, Privacy.URL] = Field(
        None, description="sha256:HEX, {SHA-256}HEX, a bare digest, or a SHA256SUMS URL"
    )
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")
    max_bytes: Bytes = Field(
        None, gt=0, description="Refuse a larger file: bytes, or 10GiB. The settings' limit if absent"
    )
    headers: Headers = Field(default_factory=dict, description="HTTP headers. Sent only to the URL's origin")
    credentials: Annotated[str | None, Privacy.PUBLIC] = Field(
        None, description="Name of credentials in the settings. Sent only to the URL's origin"
    )
    convert_to: Literal["qcow2", "raw", "vmdk"] | None = Field(
        None, description="Convert the image and store it in this format"
    )
    keep_package: bool = Field(
        False, description="Store an OVA also as one file, next to its unpacked files, as CloudStack does"
    )
    unique_name: str = Field(
        "", max_length=255, description="CloudStack's name of the template. Its agent lists only artifacts with one"
    )
    mirrors: Annotated[list[str], Privacy.URL] = Field(
        default_factory=list, max_length=20, description="Other URLs of the same file"
    )
    quota: QuotaField = None
    max_rate: Rate = Field(
        None, gt=0, description="The most bytes per second: a number, or 10MiB/s. The settings' limit if absent"
    )

    def uses(self, zone: str) -> tuple[str, ...]:
        """Return the shared resources, including the host of the URL."""
        host = urlsplit(self.url).hostname
        return super().uses(zone) + ((f"source:{host}",) if host else ())

    @field_validator("url", "mirrors")
    @classmethod
    def _known_schemes(cls, value: str | list[str]) -> str | list[str]:
        for url in [value] if isinstance(value, str) else value:
            check_url(url, SCHEMES)
        return value

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
            raise ValueError("may not begin with a dot, and may not hold slashes or control characters")
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
