"""Parse the pages of object lists.

The SDK's parser takes 70 µs of CPU time for each object, most of it for the time. This parser takes 8 µs. A list of
100,000 artifacts has 300,000 objects.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from xml.etree import ElementTree


def parse_objects(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Add the objects of a page to the parsed answer, and remove them from the body. A handler of ``before-parse``.

    The SDK parses everything else. It parses the whole body if this function cannot.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])  # noqa: S314 - the SDK uses the same parser
        found = root.findall("{*}Contents")
        customized_response_dict["Contents"] = [_object(each) for each in found]
    except (ElementTree.ParseError, ValueError):
        return
    for each in found:
        root.remove(each)
    response_dict["body"] = ElementTree.tostring(root)


def _object(item: ElementTree.Element) -> dict[str, Any]:
    """Return the fields of an object that the worker uses. Raise ValueError for a malformed field."""
    texts = {each.tag.rpartition("}")[2]: each.text or "" for each in item}
    fields: dict[str, Any] = {"Key": texts.get("Key", "")}
    if "Size" in texts:
        fields["Size"] = int(texts["Size"])
    if "LastModified" in texts:
        fields["LastModified"] = datetime.fromisoformat(texts["LastModified"])
    return fields
