"""Who carries messages: lists in the ledger's own Redis, or RabbitMQ; and how Celery is told."""

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
    """One way for messages."""

    #: As in the settings, with a password.
    url: str
    prefix: str = ""
    ca_file: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> MessageRoute:
        """That of the settings."""
        given = settings.broker
        url = given.messages.get_secret_value() if given.messages else broker_url(settings)
        return cls(url, given.prefix, str(given.ca_file) if given.ca_file else None)

    @property
    def is_rabbitmq(self) -> bool:
        """Whether it leads elsewhere than to the ledger's own Redis."""
        return urlsplit(self.url).scheme in ("amqp", "amqps")

    @property
    def shown(self) -> str:
        """Where it leads, without user and password."""
        return shown(self.url)

    @property
    def celery_url(self) -> str:
        """In Celery's spelling."""
        return self.url if self.is_rabbitmq else celery_url(self.url)

    @property
    def tls(self) -> dict[str, Any] | None:
        """``broker_use_ssl``: certificate and name are checked; None where there is no TLS."""
        parts = urlsplit(self.url)
        if parts.scheme == "amqps":
            authority = {"ca_certs": self.ca_file} if self.ca_file else {}
            return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": parts.hostname, **authority}
        return tls_options(self.ca_file) if parts.scheme in ("rediss", "sentinels") else None

    def options(self, answer_s: float, waits: bool = False) -> dict[str, Any]:
        """``broker_transport_options``. A sender must not hang for longer than *answer_s*; one that *waits* may."""
        if self.is_rabbitmq:
            bounds = {} if waits else {"read_timeout": answer_s, "write_timeout": answer_s}
            return {"confirm_publish": True, **bounds}
        return {
            "global_keyprefix": self.prefix,
            # Guards the moment between pop and ack only.
            "visibility_timeout": 3600,
            "socket_keepalive": True,
            # Seconds for one answer: a sender must not hang; a worker waits for messages in this way.
            "socket_timeout": answer_s,
            "socket_connect_timeout": 5,
            "health_check_interval": 25,
            **self._by_sentinels(),
        }

    def _by_sentinels(self) -> dict[str, Any]:
        found = sentinels(self.url)
        if not found:
            return {}
        bounds = {"socket_timeout": 3, "socket_connect_timeout": 3}
        return {"master_name": found.master, "sentinel_kwargs": found.sentinel_options | bounds}


def beat_store(settings: Settings) -> dict[str, Any]:
    """Where RedBeat (extra ``redbeat``) keeps its schedule and its lock: beside the ledger, below our prefix.

    The login stands beside the URL, where Celery knows a password when it shows its configuration.
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
