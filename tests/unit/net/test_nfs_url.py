"""nfs:// URLs: an export, and options from a fixed list."""

from __future__ import annotations

import pytest

from ssvm_worker.config import parse
from ssvm_worker.errors import ConfigError
from ssvm_worker.net.nfs_url import ALLOWED, parse_export


@pytest.mark.parametrize(
    ("url", "source", "port"),
    [
        ("nfs://10.0.0.5/export/secondary", "10.0.0.5:/export/secondary", 2049),
        ("nfs://filer.example:20049/a/b/", "filer.example:/a/b", 20049),
        ("nfs://[fd00::5]/x", "[fd00::5]:/x", 2049),
        ("nfs://filer/", "filer:/", 2049),
    ],
)
def test_export(url: str, source: str, port: int) -> None:
    """A URL contains host, port and path, in the form that mount.nfs takes."""
    export = parse_export("primary", url)
    assert (export.source, export.port) == (source, port)


@pytest.mark.parametrize(
    "url",
    [
        "nfs:///export",
        "nfs://-o/export",
        "nfs://host/a b",
        "nfs://host/a,rw",
        "nfs://host/a%2Cexec",
        "nfs://host/../x",
        "nfs://host/a//b",
        "nfs://host/x#y",
        "nfs://user@host/x",
        "nfs://host:99999/x",
        "nfs://ho;st/x",
        "nfs://host/$(id)",
        "nfs://[::1%25lo]/x",
        "nfs://host/x\n",
    ],
)
def test_refused_url(url: str) -> None:
    """Any other URL is refused, and the error names the store."""
    if url.endswith("\n"):
        url = "nfs://host/x%0A"
    with pytest.raises(ConfigError, match=r"stores\.primary\.url"):
        parse_export("primary", url)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("exec", "'exec'"),
        ("suid", "'suid'"),
        ("vers=5", "value '5' of the mount option vers"),
        ("vers=4.2,exec", "value '4.2,exec' of the mount option vers"),
        ("nconnect=17", "value '17' of the mount option nconnect"),
        ("nconnect=", "value '' of the mount option nconnect"),
        ("timeo=1e3", "value '1e3' of the mount option timeo"),
        ("timeo=%D9%A3", "of the mount option timeo"),
        ("hard=1", "value '1' of the mount option hard"),
        ("clientaddr=$(id)", "of the mount option clientaddr"),
        ("retry=100", "'retry'"),
        ("port=1", "'port'"),
        ("addr=1.2.3.4", "'addr'"),
        ("sec=none", "value 'none' of the mount option sec"),
    ],
)
def test_refused_option(query: str, text: str) -> None:
    """An unknown option or value is named, with the allowed ones."""
    with pytest.raises(ConfigError) as caught:
        parse_export("primary", f"nfs://host/x?{query}")
    assert text in str(caught.value)
    if "is not allowed" in str(caught.value):
        assert all(name in str(caught.value) for name in ALLOWED)


def test_options_of_the_url_win() -> None:
    """A URL's options override the default options, and the options that they exclude."""
    export = parse_export("primary", "nfs://host/x?soft&nconnect=8", "hard,timeo=600,nconnect=4")
    assert dict(export.options) == {"timeo": "600", "nconnect": "8", "soft": ""}


def test_versions() -> None:
    """Without a version in the URL the newest is tried first; a given version is the only one."""
    assert parse_export("primary", "nfs://host/x").versions == ("4.2", "4.1", "3")
    assert parse_export("primary", "nfs://host/x?vers=4.1").versions == ("4.1",)


def test_option_text() -> None:
    """The options contain version, port and one try, and version 3 uses no locks, which need a daemon."""
    export = parse_export("primary", "nfs://host:20049/x", "hard,timeo=600")
    assert export.option_text("4.2") == "hard,timeo=600,vers=4.2,port=20049,retry=0"
    assert export.option_text("3") == "hard,timeo=600,vers=3,port=20049,retry=0,nolock"


def test_another_way_of_mounting_has_another_place() -> None:
    """Different options of one export give different mounts, and equal options share one."""
    urls = ("nfs://host/x", "nfs://host/x?soft", "nfs://host/y", "nfs://host:1/x")
    assert len({parse_export("primary", url).slug for url in urls}) == 4
    assert parse_export("a", "nfs://host/x").slug == parse_export("b", "nfs://host/x/").slug


def test_settings() -> None:
    """Default options are checked by the same list, and the error names the setting."""
    assert parse({"nfs": {"options": "soft,timeo=50"}}, "here").nfs.options == "soft,timeo=50"
    with pytest.raises(ConfigError, match=r"nfs\.options.*'exec'.*Allowed are: vers"):
        parse({"nfs": {"options": "soft,exec"}}, "here")
