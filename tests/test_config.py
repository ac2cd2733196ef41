"""Settings: what is read from where, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.errors import EXIT_USAGE, ConfigError

WRONG: list[Any] = [
    pytest.param({"zoen": "z"}, "zoen: unknown, did you mean zone?", id="unknown key at the top"),
    pytest.param(
        {"stores": {"main": {"url": "file:///x", "endpiont": "e"}}},
        "stores.main.endpiont: unknown, did you mean endpoint?",
        id="unknown key of a store",
    ),
    pytest.param(
        {"stores": {"main": {"url": "file:///x", "acces_key_file": "e"}}},
        "stores.main.acces_key_file: unknown, did you mean access_key_file?",
        id="mistyped name of a secret's file",
    ),
    pytest.param({"worker": {"concurrency": "many"}}, "worker.concurrency: Input should be a valid integer", id="type"),
    pytest.param({"worker": {"concurrency": 0}}, "worker.concurrency: Input should be greater", id="out of range"),
    pytest.param({"worker": {"lanes": ["fast"]}}, "worker.lanes: there is no fast; there are download", id="lane"),
    pytest.param({"broker": {"url": "http://x"}}, "broker.url: must be redis://", id="broker of another scheme"),
    pytest.param({"download": {"allow_networks": ["10.0.0.0/33"]}}, "download.allow_networks", id="no network"),
    pytest.param({"vcenters": {"vc": {"host": "h"}}}, "vcenters.vc.username: Field required", id="missing key"),
    pytest.param(
        {"vcenters": {"vc": {"host": "h", "username": "u", "password_file": "/nowhere/p"}}},
        "password_file = /nowhere/p cannot be read: No such file",
        id="secret's file missing",
    ),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_wrong_settings_name_the_key(values: dict[str, Any], said: str) -> None:
    """A wrong setting is an error that names its key, and the nearest right one."""
    with pytest.raises(ConfigError) as caught:
        config.parse(values, "worker.toml")

    assert said in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


def test_all_findings_at_once() -> None:
    """Everything that is wrong is said in one go."""
    with pytest.raises(ConfigError) as caught:
        config.parse({"zoen": "z", "retry": {"max_attempts": 0}}, "worker.toml")

    assert "zoen" in str(caught.value)
    assert "retry.max_attempts" in str(caught.value)


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    """SSVM_<SECTION>__<KEY> overrides the file named by SSVM_CONFIG."""
    file = tmp_path / "worker.toml"
    file.write_text('zone = "a"\n[stores.primary]\nurl = "file:///one"\n')
    environ = {
        "SSVM_CONFIG": str(file),
        "SSVM_STORES__PRIMARY__URL": "file:///two",
        "SSVM_DOWNLOAD__ALLOW_NETWORKS": "10.0.0.0/8, 127.0.0.0/8",
        "SSVM_WORKER__CONCURRENCY": "7",
    }

    settings = config.load(environ=environ)

    assert settings.zone == "a"
    assert settings.stores["primary"].url == "file:///two"
    assert settings.download.allow_networks == ("10.0.0.0/8", "127.0.0.0/8")
    assert settings.worker.concurrency == 7


def test_unknown_environment_variable() -> None:
    """A variable that means no setting is an error too: else a typing error would be silence."""
    with pytest.raises(ConfigError, match=r"broker\.ulr: unknown, did you mean url\?"):
        config.load(environ={"SSVM_BROKER__ULR": "redis://x"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param(b"zone = ", "is not TOML", id="no TOML"),
        pytest.param(b"\xff\xfe", "is not TOML", id="no text"),
    ],
)
def test_settings_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, said: str) -> None:
    """A settings file that is missing or no TOML is named."""
    file = tmp_path / "worker.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=said) as caught:
        config.load(file, environ={})

    assert str(file) in str(caught.value)


def test_secrets_never_show(tmp_path: Path) -> None:
    """The redacted settings hold no secret, wherever it came from."""
    (tmp_path / "key").write_text("s3cret-key\n")
    values = {
        "broker": {"url": "redis://user:s3cret-broker@h:1/0"},
        "stores": {"a": {"url": "s3://b", "access_key": "s3cret-access", "secret_key_file": str(tmp_path / "key")}},
        "vcenters": {"v": {"host": "h", "username": "u", "password": "s3cret-password"}},
        "callback": {"secret": "s3cret-hmac"},
    }

    settings = config.parse(values, "x")
    secret = settings.stores["a"].secret_key

    assert secret is not None
    assert secret.get_secret_value() == "s3cret-key"
    assert "s3cret" not in str(config.redacted(settings))
    assert "s3cret" not in repr(settings)
    assert config.redacted(settings)["broker"]["url"] == "redis://***@h:1/0"
