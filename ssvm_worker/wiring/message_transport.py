"""Choose the transport of messages, Redis or RabbitMQ, and configure Celery for it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ssvm_worker.config.schema import Settings
from ssvm_worker.net.broker_url import celery_url, redis_url, sentinels, shown, tls_options, without_login

from .broker import broker_url


@dataclass(frozen=True)
class MessageRoute:
    """Transport of messages: the Redis of the ledger, or RabbitMQ."""

    #: The URL of the settings, with the password.
    url: str
    prefix: str = ""
    ca_file: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> MessageRoute:
        """Return the transport of the settings."""
        given = settings.broker
        url = given.messages.get_secret_value() if given.messages else broker_url(settings)
        return cls(url, given.prefix, str(given.ca_file) if given.ca_file else None)

    @property
    def is_rabbitmq(self) -> bool:
        """Return whether RabbitMQ transports the messages."""
        return urlsplit(self.url).scheme in ("amqp", "amqps")

    @property
    def shown(self) -> str:
        """Return the URL without user and password, for logs."""
        return shown(self.url)

    @property
    def celery_url(self) -> str:
        """Return the URL in the form that Celery requires."""
        return self.url if self.is_rabbitmq else celery_url(self.url)

    @property
    def tls(self) -> dict[str, Any] | None:
        """Return ``broker_use_ssl``, which verifies certificate and host name. None without TLS."""
        parts = urlsplit(self.url)
        if parts.scheme == "amqps":
            authority = {"ca_certs": self.ca_file} if self.ca_file else {}
            return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": parts.hostname, **authority}
        return tls_options(self.ca_file) if parts.scheme in ("rediss", "sentinels") else None

    def options(self, answer_s: float, waits: bool = False) -> dict[str, Any]:
        """Return ``broker_transport_options``.

        A sender must not block for longer than *answer_s* seconds. A worker *waits* for messages without this limit.
        """
        if self.is_rabbitmq:
            bounds = {} if waits else {"read_timeout": answer_s, "write_timeout": answer_s}
            return {"confirm_publish": True, **bounds}
        options: dict[str, Any] = {
            "global_keyprefix": self.prefix,
            # It only applies between pop and ack.
            "visibility_timeout": 3600,
            "socket_keepalive": True,
            # Seconds for one response. It limits senders. A worker waits for messages in such steps.
            "socket_timeout": answer_s,
            "socket_connect_timeout": 5,
            "health_check_interval": 25,
        }
        if found := sentinels(self.url):
            bounds = {"socket_timeout": 3, "socket_connect_timeout": 3}
            options |= {"master_name": found.master, "sentinel_kwargs": found.sentinel_options | bounds}
        return options


def beat_store(settings: Settings) -> dict[str, Any]:
    """Return the options of RedBeat (extra ``redbeat``) for its schedule and lock: in the Redis of the ledger.

    User and password are separate options, because Celery masks passwords there when it shows its configuration.
    """
    url = broker_url(settings)
    found = sentinels(url)
    bare, login = without_login(redis_url(url))
    store: dict[str, Any] = {
        "redbeat_redis_url": "redis-sentinel://" if found else bare,
        "redbeat_redis_options": login,
        "redbeat_redis_use_ssl": MessageRoute(url, ca_file=str(settings.broker.ca_file or "") or None).tls or False,
        "redbeat_key_prefix": f"{settings.broker.prefix}ssvm.redbeat:",
    }
    if found:
        store["redbeat_redis_options"] = {
            "sentinels": list(found.hosts),
            "service_name": found.master,
            "db": found.db,
            "username": found.user,
            "password": found.password,
            "socket_timeout": 5,
            "sentinel_kwargs": found.sentinel_options,
        }
    return store
