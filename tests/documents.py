"""Compare real documents with the JSON Schemas that other programs use."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from ssvm_worker.wiring.json_schemas import identity, schemas


def _closed(schema: Any) -> Any:
    """Return the schema without further fields. The published one allows them, because later versions may add some."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _closed(each) for name, each in schema.items()}
    return {"additionalProperties": False} | found if found.get("type") == "object" and "properties" in found else found


@cache
def _registry() -> Registry[Any]:
    closed = (_closed(each) for each in schemas().values())
    return Registry().with_resources((each["$id"], DRAFT202012.create_resource(each)) for each in closed)


@cache
def validator(name: str) -> Draft202012Validator:
    """Return the validator of a schema, such as ``record`` or ``download.result``."""
    return Draft202012Validator(_registry().contents(identity(name)), registry=_registry())


def check_document(name: str, document: Any) -> None:
    """Fail with every difference between a document and its schema."""
    found = [f"{each.json_path}: {each.message}" for each in validator(name).iter_errors(document)]
    assert not found, "\n".join(found)
