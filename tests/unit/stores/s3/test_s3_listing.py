"""The worker's parser of object lists agrees with the SDK's parser."""

from __future__ import annotations

from typing import Any

import botocore.session
import pytest
from botocore.parsers import ResponseParserError, ResponseParserFactory

from ssvm_worker.stores.s3.client import S3Settings
from ssvm_worker.stores.s3.listing import objects_in, take_objects
from ssvm_worker.stores.s3.store import S3Store

_NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_SHAPE = botocore.session.Session().get_service_model("s3").operation_model("ListObjectsV2").output_shape
_TAIL = "<KeyCount>2</KeyCount><IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"


def parsed_by_sdk(body: bytes) -> dict[str, Any]:
    """Return what the SDK makes of a body."""
    answer = {"status_code": 200, "headers": {}, "body": body}
    return ResponseParserFactory().create_parser("rest-xml").parse(answer, _SHAPE)


def parsed_by_worker(body: bytes, status: int = 200) -> dict[str, Any]:
    """Return what both parsers together make of a body, in the order of the SDK's events."""
    answer: dict[str, Any] = {"status_code": status, "headers": {}, "body": body}
    customized: dict[str, Any] = {}
    take_objects(answer, customized)
    return parsed_by_sdk(answer["body"]) | customized


def item(key: str, modified: str = "2026-11-29T07:30:27.123Z", size: str = "<Size>7</Size>") -> str:
    """Return an item of a list with more fields than the worker uses."""
    return (
        f"<Contents><Key>{key}</Key><LastModified>{modified}</LastModified><ETag>&quot;e&quot;</ETag>{size}"
        "<StorageClass>STANDARD</StorageClass><Owner><ID>Size</ID></Owner></Contents>"
    )


@pytest.mark.parametrize("namespace", [_NAMESPACE, ""], ids=["namespace", "none"])
@pytest.mark.parametrize(
    "items",
    [
        pytest.param("", id="none"),
        pytest.param(item("a/b") + item("c"), id="two"),
        pytest.param(item("a&amp;b%20%C3%A4\u00e4"), id="entities"),
        pytest.param(item("a", size=""), id="no size"),
        pytest.param(item("a", "2026-11-29T07:30:27Z") + item("b", "2026-11-29T07:30:27.123456789+01:00"), id="times"),
        pytest.param(item("a") + item("b", "Sun, 29 Nov 2026 07:30:27 GMT"), id="a time in another format"),
        pytest.param(item("a") + "<EncodingType>x</EncodingType>" + item("b"), id="between two objects"),
    ],
)
def test_agrees(items: str, namespace: str) -> None:
    """Keys, sizes and times are those of the SDK, and the rest of the page stays."""
    body = f'<?xml version="1.0"?><ListBucketResult{namespace}>{items}{_TAIL}</ListBucketResult>'.encode()
    expected, found = parsed_by_sdk(body), parsed_by_worker(body)
    fields = ("Key", "Size", "LastModified")
    rows = [
        [{name: each[name] for name in fields if name in each} for each in objects]
        for objects in (expected.get("Contents", []), objects_in(found))
    ]
    assert rows[0] == rows[1]
    assert (found["IsTruncated"], found["NextContinuationToken"]) == (True, "next")


def test_quoted_keys() -> None:
    """A key is unquoted only if the server says that it has quoted the keys, as the SDK has asked."""
    for encoding, key in (("<EncodingType>url</EncodingType>", "a b/ä"), ("", "a+b/%C3%A4")):
        body = f"<ListBucketResult>{encoding}{item('a+b/%C3%A4')}{_TAIL}</ListBucketResult>".encode()
        assert [each["Key"] for each in objects_in(parsed_by_worker(body))] == [key]


@pytest.mark.parametrize("items", [item("a", "yesterday"), item("a", size="<Size>x</Size>"), "<Contents>&</Contents>"])
def test_malformed_objects(items: str) -> None:
    """A malformed object is the error that the SDK has for a malformed answer."""
    body = f"<ListBucketResult>{items}{_TAIL}</ListBucketResult>".encode()
    with pytest.raises(ResponseParserError):
        list(objects_in(parsed_by_worker(body)))


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<ListBucketResult><Contents>"), (200, b""), (503, b"<Error><Code>SlowDown</Code></Error>")],
)
def test_leaves_other_answers_to_the_sdk(status: int, body: bytes) -> None:
    """An error, or a body that is no XML, is left unchanged."""
    answer: dict[str, Any] = {"status_code": status, "headers": {}, "body": body}
    customized: dict[str, Any] = {}
    take_objects(answer, customized)
    assert (answer["body"], customized) == (body, {})


@pytest.mark.parametrize(
    ("bucket", "region", "place"),
    [
        ("bucket", None, "bucket.s3.amazonaws.com/"),
        ("bucket", "eu-central-1", "bucket.s3.eu-central-1.amazonaws.com/"),
        ("bucket", "cn-north-1", "bucket.s3.cn-north-1.amazonaws.com.cn/"),
        ("with.dots", "cn-north-1", "s3.cn-north-1.amazonaws.com.cn/with.dots/"),
    ],
)
def test_boto3_finds_the_endpoint(bucket: str, region: str | None, place: str) -> None:
    """Without an endpoint in the settings, links lead to Amazon's endpoint of the region."""
    store = S3Store("archive", bucket, "", S3Settings(region=region, access_key="a", secret_key="b"))
    assert store.presign("key", 60).startswith(f"https://{place}key?")
