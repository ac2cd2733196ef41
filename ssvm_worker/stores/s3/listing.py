"""Parse the pages of object lists.

A page names the next one, so the next request must wait for a part of this page only. ``take_objects`` lets the SDK
parse that part. ``objects_in`` parses the objects while the server prepares the next page. The SDK's parser takes 70 µs
of CPU time for each object, most of it for the time. This parser takes 6 µs. A list of 100,000 artifacts has 300,000
objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

#: The field of a parsed answer that has the whole body of the page.
_PAGE = "PageWithObjects"
_BEGIN, _END = b"<Contents>", b"</Contents>"
#: Elements that the SDK must see. No known server sends them between two objects.
_NEEDED = (b"<IsTruncated", b"<NextContinuationToken", b"<EncodingType")


def take_objects(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Remove the objects from the body that the SDK parses, and keep the whole body. A handler of ``before-parse``.

    The SDK parses the whole body if this function does not find the objects in one piece.
    """
    body: bytes = response_dict["body"]
    begin, end = body.find(_BEGIN), body.rfind(_END)
    if response_dict["status_code"] != 200 or not 0 < begin < end:
        return
    if any(body.find(each, begin, end) >= 0 for each in _NEEDED):
        return
    customized_response_dict[_PAGE] = body
    response_dict["body"] = body[:begin] + body[end + len(_END) :]


def objects_in(page: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a parsed answer, with the fields that the worker uses. Raise ResponseParserError."""
    if _PAGE not in page:
        yield from page.get("Contents", [])
        return
    # The SDK asks each server to quote keys. A server that does so says it.
    is_quoted = page.get("EncodingType") == "url"
    try:
        root = ElementTree.fromstring(page[_PAGE])  # noqa: S314 - the SDK uses the same parser
        space = root.tag.rpartition("}")[0] + "}" if "}" in root.tag else ""
        for each in root.iterfind(f"{space}Contents"):
            yield _object(each, space, is_quoted)
    except (ElementTree.ParseError, ValueError) as error:
        raise ResponseParserError(f"Invalid list of objects: {error}") from error


def _object(item: ElementTree.Element, space: str, is_quoted: bool) -> dict[str, Any]:
    """Return the fields of an object. Raise ValueError for a malformed one."""
    key = item.findtext(f"{space}Key", "")
    fields: dict[str, Any] = {"Key": unquote_plus(key) if is_quoted else key}
    if size := item.findtext(f"{space}Size"):
        fields["Size"] = int(size)
    if modified := item.findtext(f"{space}LastModified"):
        try:
            fields["LastModified"] = datetime.fromisoformat(modified)
        except ValueError:
            fields["LastModified"] = parse_timestamp(modified)
    return fields
