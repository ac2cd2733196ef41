"""What Flower's pages answer if the broker does not serve them."""

from __future__ import annotations

import pytest

from ssvm_worker.config import parse
from tasks.flower import handlers
from tests.neighbours import free_port
from tests.servers.broker import Broker


@pytest.mark.parametrize("cause", ["refuses the password", "cannot be reached"])
def test_no_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    """If the broker is away or refuses the password, the status is 503, with cause and remedy."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    if "password" in cause:
        url = f"unix://flower:wrong-password@{broker.path}?db=0"
    monkeypatch.setattr(handlers, "_settings", lambda: parse({"broker": {"url": url}}, "the test"))

    status, values = handlers._run_query(handlers._list, {})

    assert status == 503
    assert f"The broker {cause}: " in values["message"]
    assert "broker.url" in values["message"].rpartition("]. ")[2]
