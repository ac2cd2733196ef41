"""Receive messages: kombu's transports, changed so that they survive any message.

kombu raises in the event loop for a message that it cannot read. Celery then ends the worker, and the broker delivers
the message to the next worker. Here such a message reaches ``tasks.consumer``, which refuses it.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from functools import partial
from queue import Empty
from typing import Any

from amqp.basic_message import Message as Frame  # type: ignore[import-untyped]
from amqp.method_framing import frame_handler  # type: ignore[import-untyped]
from kombu.transport import TRANSPORT_ALIASES, pyamqp, redis, virtual

from ssvm_worker.jobs.request import MAX_BYTES

_LOG = logging.getLogger("ssvm.messages")
#: The largest message in Redis, in bytes. Base64 adds a third to the body; headers and properties need a little.
_MAX_ENVELOPE = MAX_BYTES * 3 // 2
#: The body in an envelope: a JSON string without escapes, because base64 contains none.
_BODY = re.compile(rb'"body"\s*:\s*"[^"\\]*"')


class RedisMessage(virtual.Message):
    """A message of Redis in any form. ``problem`` is its defect, or ""."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        self.problem = _problem(payload)
        given = _repaired(payload) if self.problem else payload
        given.get("headers", {}).pop("compression", None)  # 256 KiB may decompress to any number of bytes
        super().__init__(given, channel=channel, **kwargs)


def _problem(payload: Any) -> str:
    """Return the defect of a message that kombu cannot handle, or "". kombu itself does not check the form."""
    if not isinstance(payload, dict):
        return "The message is not an object"
    if size := payload.get(_TOO_LARGE):
        return f"The message has {size} bytes; {_MAX_ENVELOPE} are allowed"
    properties, body = payload.get("properties"), payload.get("body")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str | int):
        return "The message has no properties with a delivery_tag"
    place = properties.get("delivery_info")
    if not isinstance(place, dict) or not all(isinstance(place.get(each), str) for each in ("exchange", "routing_key")):
        return "The message has no delivery_info with exchange and routing_key"
    if not isinstance(payload.get("headers"), dict):
        return "The headers are not an object"
    if not isinstance(body, str):
        return "The body is not a string"
    return "" if _is_decodable(body, properties.get("body_encoding")) else "The body is not in its body_encoding"


def _is_decodable(body: str, encoding: Any) -> bool:
    try:
        if encoding == "base64":
            redis.Channel.codecs["base64"].decode(body)
        return encoding in ("base64", "utf-8", None)
    except ValueError:
        return False


def _repaired(payload: Any) -> dict[str, Any]:
    """Return a message that kombu can read: without a body, but with task and id."""
    headers = payload.get("headers") if isinstance(payload, dict) else None
    given = headers if isinstance(headers, dict) else {}
    return {
        "headers": {name: value for name in ("id", "task") if isinstance(value := given.get(name), str)},
        "properties": {"delivery_tag": uuid.uuid4().hex, "delivery_info": {"exchange": "", "routing_key": ""}},
    }


_TOO_LARGE = "ssvm too large"


def _within_limits(item: bytes) -> bytes:
    """Return the message. If it is too large, return its envelope with a note instead of the body."""
    if len(item) <= _MAX_ENVELOPE:
        return item
    note = f'"{_TOO_LARGE}": {len(item)}'.encode()
    envelope = _BODY.sub(note, item, count=1)
    return envelope if len(envelope) <= _MAX_ENVELOPE else b"{" + note + b"}"


class _Surviving:
    """A channel of Redis whose reads survive any message."""

    Message = RedisMessage
    connection: Any
    connection_errors: tuple[type[Exception], ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.handlers: dict[str, Callable[[], Any]] = {
            kind: partial(self._survive, read) for kind, read in self.handlers.items()
        }

    def _survive(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (Empty, *self.connection_errors, *self.connection.channel_errors):
            raise
        except Exception as error:  # noqa: BLE001 - the message is no JSON, or is nested too deep for Python
            _LOG.error("a message that is not Celery's is dropped: %s: %.200s", type(error).__name__, error)
            return True

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)  # type: ignore[misc]

        def bounded(answer: Any, **_: Any) -> Any:
            return answer and (answer[0], _within_limits(answer[1]))

        client.set_response_callback("BRPOP", bounded)
        return client


class RedisChannel(_Surviving, redis.Channel):
    """A channel of one server."""


class SentinelChannel(_Surviving, redis.SentinelChannel):
    """A channel of the master that Sentinels name."""


class RedisTransport(redis.Transport):
    """The transport for Redis or Valkey."""

    Channel = RedisChannel


class SentinelTransport(redis.SentinelTransport):
    """The transport for the master that Sentinels name."""

    Channel = SentinelChannel


class RabbitMessage(pyamqp.Message):
    """A message of RabbitMQ. Its body is not decompressed either."""

    problem = ""

    def __init__(self, msg: Any, channel: Any = None, **kwargs: Any) -> None:
        (msg.properties.get("application_headers") or {}).pop("compression", None)
        super().__init__(msg, channel, **kwargs)


class RabbitChannel(pyamqp.Channel):
    """A channel of RabbitMQ."""

    Message = RabbitMessage


class RabbitConnection(pyamqp.Connection):
    """A connection that survives unreadable properties of a message. They are dropped."""

    Channel = RabbitChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, frame_handler=_frame_handler, **kwargs)


def _frame_handler(connection: Any, callback: Any) -> Callable[[Any], Any]:
    """Return amqp's handler of frames, which drops unreadable properties of a content header."""
    on_frame = frame_handler(connection, callback)

    def on_any_frame(frame: Any) -> Any:
        kind, channel, content = frame
        if kind == _CONTENT_HEADER:
            try:
                Frame().inbound_header(content)
            except Exception as error:  # noqa: BLE001 - headers are nested too deep, or text is not UTF-8
                _LOG.error("the properties of a message cannot be read: %s: %.200s", type(error).__name__, error)
                content = bytes(content[:_CLASS_AND_SIZE]) + bytes(2)  # flags that announce no property
        return on_frame((kind, channel, content))

    return on_any_frame


#: The type of the frame with a message's properties, and the number of bytes before them: AMQP 0-9-1, 4.2.6.1.
_CONTENT_HEADER, _CLASS_AND_SIZE = 2, 12


class RabbitTransport(pyamqp.Transport):
    """The transport for RabbitMQ."""

    Connection = RabbitConnection


class RabbitTlsTransport(pyamqp.SSLTransport):
    """The transport for RabbitMQ with TLS."""

    Connection = RabbitConnection


def register() -> None:
    """Make kombu use these transports in this process, by the scheme of the URL. Safe to repeat."""
    transports = {
        "redis": RedisTransport,
        "sentinel": SentinelTransport,
        "amqp": RabbitTransport,
        "amqps": RabbitTlsTransport,
    }
    TRANSPORT_ALIASES.update({scheme: f"{__name__}:{each.__name__}" for scheme, each in transports.items()})
    TRANSPORT_ALIASES["rediss"] = TRANSPORT_ALIASES["redis"]
