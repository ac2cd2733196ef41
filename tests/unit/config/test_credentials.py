"""Credentials are sent only to listed hosts, and without encryption only if the settings allow it."""

from __future__ import annotations

from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.config.credentials import named_credentials
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.sources import SCHEMES

#: Whether each scheme with a host encrypts what it sends.
ENCRYPTS = {"https": True, "sftp": True, "scp": True, "http": False, "ftp": False}


def named(url: str, **more: Any) -> bool:
    """Return whether credentials for the host h may be sent to this URL."""
    section = {"username": "u", "password": "p", "hosts": ["h"]} | more
    settings = config.parse({"credentials": {"web": section}}, "x")
    return named_credentials(settings, "web", url) is settings.credentials["web"]


def test_every_scheme_is_known() -> None:
    """The table of this test has every scheme of a source with a host."""
    assert set(SCHEMES) - {"file", "s3", "store"} == set(ENCRYPTS)


@pytest.mark.parametrize("scheme", ENCRYPTS)
@pytest.mark.parametrize(
    "secret", [{}, {"username": None, "token": "t"}, {"username": None, "certificate_file": "/c"}], ids=str
)
def test_without_encryption(scheme: str, secret: dict[str, Any]) -> None:
    """A scheme without encryption needs allow_plaintext, in any spelling, and the error names this key."""
    for url in (f"{scheme}://h/x", f"{scheme.upper()}://h/x"):
        assert named(url, allow_plaintext=True, **secret)
        if ENCRYPTS[scheme]:
            assert named(url, **secret)
            continue
        with pytest.raises(InvalidRequest, match=r"without encryption over .*credentials\.web\.allow_plaintext"):
            named(url, **secret)


@pytest.mark.parametrize("url", ["ftps://h/x", "ws://h/x", "h://h/x", "//h/x"])
def test_unknown_schemes(url: str) -> None:
    """An unknown scheme counts as one without encryption."""
    with pytest.raises(InvalidRequest, match="without encryption"):
        named(url)
