"""Settings: their sources, and the errors for wrong ones."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, SecretStr

from ssvm_worker import config
from ssvm_worker.config.schema import Settings
from ssvm_worker.config.types import MustExist
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
    pytest.param({"worker": {"concurrency": "many"}}, "worker.concurrency: must be a whole number", id="type"),
    pytest.param({"worker": {"concurrency": 0}}, "worker.concurrency: must be at least 1", id="out of range"),
    pytest.param({"worker": {"lanes": ["fast"]}}, "worker.lanes: unknown: fast. Known are download", id="lane"),
    pytest.param({"broker": {"url": "http://x"}}, "broker.url: must be redis://", id="broker of another scheme"),
    pytest.param({"download": {"allow_networks": ["10.0.0.0/33"]}}, "download.allow_networks", id="no network"),
    pytest.param({"vcenters": {"vc": {"host": "h"}}}, "vcenters.vc.username: missing", id="missing key"),
    pytest.param(
        {"vcenters": {"vc": {"host": "h", "username": "u", "password_file": "/nowhere/p"}}},
        "password_file = /nowhere/p cannot be read: No such file",
        id="secret's file missing",
    ),
    pytest.param(
        {"vcenters": {"vc": {"host": "h", "username": "u", "password": "p", "hosts": {"esx": "https://esx"}}}},
        "vcenters.vc.hosts: esx: 'https://esx' is not a name or address",
        id="URL of a host",
    ),
    pytest.param(
        {"vcenters": {"vc": {"host": "name:9", "username": "u", "password": "p"}}},
        'vcenters.vc.host: has a port. Use the field port: host = "name" and port = 9',
        id="host with a port",
    ),
    pytest.param(
        {"vcenters": {"vc": {"host": "https://name/sdk", "username": "u", "password": "p"}}},
        "vcenters.vc.host: must be a name or an address, without https:// and path",
        id="URL instead of a host",
    ),
    *(
        pytest.param({section: {each: {}}}, f"{section}.{each[:60]}: rename it", id=f"{section} {each!r}")
        for section in ("stores", "vcenters", "credentials")
        for each in ("a b", "a,b", "a/b", "a:b", "a__b", "-a", "a.", "ä", "a" * 65)
    ),
    *(
        pytest.param({"serve": {section: {"a b": {}}}}, f"serve.{section}.a b: rename it", id=f"name in {section}")
        for section in ("keys", "tokens")
    ),
    *(
        pytest.param(values, f"{'.'.join(place)}.proxy: must be http://[user", id=f"proxy {proxy} of {place[0]}")
        for proxy in (
            "foo",
            "foo:3128",
            "http://",
            "http://a b:1",
            "http://h:port",
            "http://h:0",
            "http://h/x",
            "ftp://h",
        )
        for place, values in (
            (("download",), {"download": {"proxy": proxy}}),
            (("stores", "a"), {"stores": {"a": {"url": "s3://bucket", "proxy": proxy}}}),
            (("credentials", "a"), {"credentials": {"a": {"proxy": proxy}}}),
        )
    ),
    *(
        pytest.param({"broker": {"prefix": each}}, "broker.prefix: may not contain spaces", id=f"prefix {each!r}")
        for each in ("a b", "a\n", "a\tb", "a\x00", "a\x7f", "a\u2028", "a\u200b")
    ),
    pytest.param(
        {"broker": {"url": "redis://h", "url_file": "/x"}},
        "url and url_file are both set. Remove one of them",
        id="secret and its file",
    ),
    pytest.param(
        {"stores": {"a": {"url": "s3://b", "access_key": "k"}}},
        "stores.a: access_key and secret_key belong together",
        id="half of a pair of keys",
    ),
]


@pytest.mark.parametrize("host", ["vc.example", "10.0.0.5", "fd00::5", "[fd00::5]"])
def test_hosts_of_vcenters(host: str) -> None:
    """A name and an address of either family are hosts of a vCenter."""
    section = {"host": host, "username": "u", "password": "p"}
    assert config.parse({"vcenters": {"vc": section}}, "x").vcenters["vc"].host == host.strip("[]")


def test_unreadable_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The remedy for a file that another user may read is that user."""
    file = tmp_path / "worker.toml"
    file.touch()
    monkeypatch.setattr(Path, "read_text", lambda _: open_denied())
    with pytest.raises(ConfigError, match="Run the command as root, or as a user"):
        config.load(file, {})


def open_denied() -> str:
    """Fail as an open without the right to read."""
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_wrong_settings_name_the_key(values: dict[str, Any], said: str) -> None:
    """The error of a wrong setting names its key and the nearest valid one."""
    with pytest.raises(ConfigError) as caught:
        config.parse(values, "worker.toml")

    assert said in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


def test_all_findings_at_once() -> None:
    """One error reports all wrong settings together."""
    with pytest.raises(ConfigError) as caught:
        config.parse({"zoen": "z", "retry": {"max_attempts": 0}}, "worker.toml")

    assert "zoen" in str(caught.value)
    assert "retry.max_attempts" in str(caught.value)


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    """SSVM_<SECTION>__<KEY> overrides the file that SSVM_CONFIG names."""
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
    """A variable that names no setting of a section is an error, because it may be a typing error."""
    with pytest.raises(ConfigError, match=r"SSVM_BROKER__ULR \(broker\.ulr\): unknown, did you mean url\?"):
        config.load(environ={"SSVM_BROKER__ULR": "redis://x"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param(b"zone = ", "is not TOML", id="no TOML"),
        pytest.param(b"\xff\xfe", "is not TOML", id="no text"),
        pytest.param(b"zone = " + b"1" * 5000, "is not TOML", id="number of 5000 digits"),
    ],
)
def test_settings_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, said: str) -> None:
    """The error names a settings file that is missing or not TOML."""
    file = tmp_path / "worker.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=said) as caught:
        config.load(file, environ={})

    assert str(file) in str(caught.value)


def test_secrets_never_show(tmp_path: Path) -> None:
    """The redacted settings show no secret from any source."""
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
    assert config.redacted(settings)["broker"]["url"] == "redis://h:1/0"


OF_A_SERVICE = {
    "SSVM_METRICS_PORT": "tcp://10.43.7.1:9808",
    "SSVM_METRICS_SERVICE_HOST": "10.43.7.1",
    "SSVM_METRICS_SERVICE_PORT": "9808",
    "SSVM_METRICS_SERVICE_PORT_METRICS": "9808",
    "SSVM_METRICS_PORT_9808_TCP": "tcp://10.43.7.1:9808",
    "SSVM_METRICS_PORT_9808_TCP_PROTO": "tcp",
    "SSVM_METRICS_PORT_9808_TCP_PORT": "9808",
    "SSVM_METRICS_PORT_9808_TCP_ADDR": "10.43.7.1",
    "SSVM_BROKER_PORT": "tcp://10.43.7.1:6379",
    "SSVM_ZONE_SERVICE_HOST": "10.43.7.1",
}


def test_variables_of_services(caplog: pytest.LogCaptureFixture) -> None:
    """Kubelet's variables for services with similar names are ignored."""
    assert config.load(environ=OF_A_SERVICE) == config.load(environ={})
    assert caplog.text == ""


def test_unknown_variable_at_the_top(caplog: pytest.LogCaptureFixture) -> None:
    """An unknown top-level variable is logged once with the nearest setting, and stops nothing."""
    for _ in range(2):
        assert config.load(environ={"SSVM_ZOEN": "z"}).zone == "zone1"
    assert caplog.text.count("SSVM_ZOEN: unknown setting, did you mean SSVM_ZONE?") == 1


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SSVM_BROKER": "x", "SSVM_BROKER__URL": "redis://h"}, "SSVM_BROKER: broker is a section"),
        ({"SSVM_STORES": "x"}, "SSVM_STORES: stores is a section"),
        ({"SSVM_ZONE__NAME": "x"}, "SSVM_ZONE__NAME"),
        ({"SSVM_ZONE": "x", "SSVM_ZONE__NAME": "x"}, "SSVM_ZONE__NAME: zone is a value"),
        ({"SSVM_BROKR__URL": "x"}, "SSVM_BROKR__URL (brokr): unknown, did you mean broker?"),
        ({"SSVM_RETRY__MAX_ATTEMPTS": "x"}, "SSVM_RETRY__MAX_ATTEMPTS (retry.max_attempts): must be a whole number"),
        ({"SSVM_LOG__LEVEL": "wraning"}, "SSVM_LOG__LEVEL (log.level): must be one of info, warning, error, did you"),
        ({"SSVM_CALLBACK__SECRET_FILE": "/nowhere/x"}, "SSVM_CALLBACK__SECRET_FILE (callback): secret_file"),
        ({"SSVM_DOWNLOAD__STALL_S": "inf"}, "SSVM_DOWNLOAD__STALL_S (download.stall_s): must be"),
        ({"SSVM_WORKER__LANES__X": "1", "SSVM_WORKER__LANES": "upload"}, "SSVM_WORKER__LANES__X: worker.lanes is"),
    ],
)
def test_errors_name_the_variable(environ: dict[str, str], said: str) -> None:
    """The error of a wrong variable names the variable, and has the form of a file's error."""
    with pytest.raises(ConfigError) as caught:
        config.load(environ=environ)
    assert said in str(caught.value)


def test_names_with_capitals(tmp_path: Path) -> None:
    """A variable can name a store with capitals, dashes and dots, and an ambiguous variable is refused."""
    file = tmp_path / "worker.toml"
    file.write_text('[stores."Main.NFS"]\nurl = "file:///one"\n')
    assert list(config.load(file, {"SSVM_STORES__MAIN_NFS__URL": "file:///two"}).stores) == ["Main.NFS"]
    file.write_text('[stores.Main-NFS]\nurl = "file:///one"\n')
    environ = {"SSVM_STORES__MAIN_NFS__URL": "file:///two"}
    assert {name: each.url for name, each in config.load(file, environ).stores.items()} == {"Main-NFS": "file:///two"}
    file.write_text('[stores.Main-NFS]\nurl = "file:///one"\n[stores.main_nfs]\nurl = "file:///one"\n')
    with pytest.raises(ConfigError, match="it could mean Main-NFS or main_nfs"):
        config.load(file, environ)


def test_units_of_settings() -> None:
    """Sizes, rates and times in settings have the same units as in requests."""
    environ = {"SSVM_DOWNLOAD__MAX_BYTES": "10GiB", "SSVM_DOWNLOAD__MAX_RATE": "10MiB/s", "SSVM_NFS__IDLE_S": "15m"}
    settings = config.load(environ=environ)
    assert (settings.download.max_bytes, settings.download.max_rate) == (10 << 30, 10 << 20)
    assert settings.nfs.idle_s == 900


@pytest.mark.parametrize(
    "values",
    [
        {
            "broker": {
                "url": "sentinel://u:s3cret@h,i/0?master=m&sentinel_password=s3cret",
                "sentinel_password": "s3cret",
            }
        },
        {"broker": {"url": "redis://h/0?password=s3cret"}},
        {"broker": {"messages": "amqp://u:s3cret@h/v?password=s3cret"}},
        {"callback": {"secret": "s3cret://s3cret"}},
        {"stores": {"a": {"url": "s3://b", "access_key": "s3cret://s3cret", "secret_key": "embedded-s3cret"}}},
        {"download": {"proxy": "http://u:s3cret@h:3128"}},
        {"credentials": {"a": {"token": "s3cret://s3cret", "password": "s3cret"}}},
    ],
)
def test_no_form_of_a_secret_shows(values: dict[str, Any]) -> None:
    """A secret is masked by its field, not its form, and a URL keeps its host and path."""
    shown = json.dumps(config.redacted(config.parse(values, "x")))
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    "values",
    [
        {"broker": {"url": "redis://:s3cret/s3cret@h/0"}},
        {"broker": {"url": "redis://u:s3cret?x@h/0"}},
        {"broker": {"messages": "amqp://u:s3cret/x@h/v"}},
        {"broker": {"url": "sentinel://h/s3cret?master=m"}},
        {"stores": {"a": {"url": "s3://k:s3cret@b"}}},
        {"stores": {"a": {"url": "s3://bucket", "proxy": "u:s3cret@h:1"}}},
        {"download": {"proxy": "http://u:s3cret/x@h:1"}},
        {"stores": {"a": {"url": "s3://b", "endpoint": "http://k:s3cret@h"}}},
    ],
)
def test_errors_repeat_no_secret(values: dict[str, Any]) -> None:
    """The error of a URL with a wrong password does not repeat the password."""
    with pytest.raises(ConfigError) as caught:
        config.parse(values, "x")
    assert "s3cret" not in str(caught.value)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a section of the settings and all sections inside it."""
    yield model
    for each in model.model_fields.values():
        for kind in kinds(each.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def kinds(annotation: Any) -> list[Any]:
    """Return an annotation and all types inside it."""
    return [annotation, *(kind for each in get_args(annotation) for kind in kinds(each))]


def test_secret_settings_are_marked() -> None:
    """Each setting whose name suggests a secret has a secret type, except paths of files."""
    suspicious = re.compile("password|passphrase|secret|token|(access|private|api)_key|(?<!no_)proxy")
    forgotten = [
        f"{section.__name__}.{name}: {each.annotation}"
        for section in sections(Settings)
        for name, each in section.model_fields.items()
        if suspicious.search(name) and Path not in kinds(each.annotation) and bool not in kinds(each.annotation)
        # The fields of a section inside it are checked themselves.
        if not any(
            isinstance(kind, type) and issubclass(kind, (SecretStr, BaseModel)) for kind in kinds(each.annotation)
        )
    ]
    assert forgotten == []


def test_paths_that_must_exist_are_marked() -> None:
    """Each setting with a path says that the path must exist, except directories that the worker creates."""
    created = {"state_dir", "mount_root", "spill_dir", "dir"}
    marked = {
        (section.__name__, name): any(isinstance(mark, MustExist) for mark in each.metadata)
        for section in sections(Settings)
        for name, each in section.model_fields.items()
        if Path in kinds(each.annotation)
    }
    assert {name for (_, name), is_marked in marked.items() if not is_marked} == created


def paths(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each setting. The members of a table of sections have the name x."""
    for name, each in section.model_fields.items():
        yield (*path, name)
        for kind in kinds(each.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from paths(
                    kind, (*path, name, "x") if dict in map(get_origin, kinds(each.annotation)) else (*path, name)
                )


@pytest.mark.parametrize("value", [True, -1, "x", [1], {"a": {"b": 1}}], ids=repr)
def test_any_value(value: object) -> None:
    """A value of any type is valid, or a ConfigError."""
    for path in paths(Settings):
        values: Any = value
        for name in reversed(path):
            values = {name: values}
        with contextlib.suppress(ConfigError):
            config.parse(values, "test")
