"""Commands and answers keep all fields of CloudStack's classes, and never show a secret."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.messages import MESSAGES, decode, encode
from ssvm_worker.errors import InvalidRequest

from .recorded import conversations, vectors

#: Messages that the session answers, or that tests of the wire use.
_OF_THE_SESSION = {
    *("StartupSecondaryStorageCommand", "StartupAnswer", "ReadyCommand", "ReadyAnswer", "PingCommand", "PingAnswer"),
    *("PingStorageCommand", "PingTestCommand", "ShutdownCommand"),
}
VECTORS = {
    f"{name}-{number}": message
    for name, (recorded, _) in vectors().items()
    for number, message in enumerate(recorded.frame().messages)
    if message.short not in _OF_THE_SESSION
}
SECRETS = ("examplepw", "example/secret+key", "EXAMPLEACCESS", "BEGIN KEY", "postUploadKey='k'", '"pp"', "x=1")


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name: str) -> None:
    """A message of CloudStack's classes has equal content after decoding and encoding."""
    message = VECTORS[name]
    again = encode(decode(message))
    assert again.name == message.name
    assert again.content == message.content


def test_conversations() -> None:
    """Every recorded message has equal content after decoding and encoding, without the fields that are null."""
    known = 0
    for name, frames in conversations().items():
        if "wrongly-wrapped" in name:  # an agent's answer that the server did not understand
            continue
        for recorded in frames:
            for message in recorded.frame().messages:
                if message.name in MESSAGES:
                    known += 1
                    assert encode(decode(message)).content == _without_nulls(message.content), message.name
    assert known > 100


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", VECTORS)
def test_no_secret_in_repr(name: str) -> None:
    """The repr of a message has no password, no key, no certificate key and no query of a URL."""
    message = decode(VECTORS[name])
    shown = f"{message!r} {message}"
    for secret in SECRETS:
        assert secret not in shown
    assert "execid" not in json.dumps(VECTORS[name].content) or "SecretStr" in shown


def test_unknown_fields() -> None:
    """Fields of a newer CloudStack are ignored, also in transfer objects."""
    store = {"com.cloud.agent.api.to.NfsTO": {"_url": "nfs://a/b", "_role": "Image", "new": [1]}}
    content = {"store": store, "alsoNew": {"a": 1}}
    message = decode(RawMessage("com.cloud.agent.api.storage.ListTemplateCommand", content))
    assert encode(message).content == {
        "store": {"com.cloud.agent.api.to.NfsTO": {"_url": "nfs://a/b", "_role": "Image"}}
    }


_DOWNLOAD = "org.apache.cloudstack.storage.command.DownloadProgressCommand"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (_DOWNLOAD, {"url": "http://a/b", "request": "RESUME"}, "request"),
        (_DOWNLOAD, {"url": "http://a/b", "resourceType": "BOTTLE"}, "resourceType"),
        (_DOWNLOAD, {"request": "PURGE"}, "url"),
        (_DOWNLOAD, {"url": "http://a/b", "_store": {"java.lang.Runtime": {}}}, "_store"),
        (_DOWNLOAD, {"url": "http://a/b", "_store": {"_url": "nfs://a/b", "_role": "Image"}}, "_store"),
        (_DOWNLOAD, {"url": "http://a/b", "maxDownloadSizeInBytes": [1]}, "maxDownloadSizeInBytes"),
        ("com.cloud.agent.api.storage.ListTemplateCommand", {"store": []}, "store"),
        ("a.Unknown", {}, "class"),
    ],
)
def test_wrong_values(name: str, content: dict[str, Any], expected: str) -> None:
    """A wrong enum value, class or type is an error that names the field and shows no value."""
    with pytest.raises(InvalidRequest) as caught:
        decode(RawMessage(name, content))
    assert expected in str(caught.value)
    assert "http://a/b" not in str(caught.value)


def test_lenient_numbers() -> None:
    """The text of a number or of a truth value is read, as CloudStack's JSON library does."""
    content = {"url": "http://a/b", "id": "87", "hvm": "true"}
    message: Any = decode(RawMessage(_DOWNLOAD, content))
    assert (message.id, message.hvm) == (87, True)
