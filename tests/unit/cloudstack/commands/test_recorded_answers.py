"""Our answers have the class and the fields of those that the Java agent has sent to a real server.

Where they differ, the table says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssvm_worker.cloudstack.frame import RawMessage
from tests.servers.broker import Broker
from tests.unit.cloudstack.recorded import conversations

from .agents import java_template
from .test_downloads import Zone

#: The families of these modules, and the fields that only the Java agent's answer has, with the reason.
DIFFERENCES: dict[str, set[str]] = {
    "SecStorageSetupCommand": set(),
    "ListTemplateCommand": set(),
    "ListVolumeCommand": set(),
    "GetStorageStatsCommand": set(),
    "DownloadCommand": set(),
    # The store of this test has no OVA. See test_ovf_information.py.
    "DownloadProgressCommand": {"ovfInformationTO"},
    "ListDataStoreObjectsCommand": set(),
}


@dataclass(frozen=True)
class Exchange:
    """One command of the server, and the Java agent's answer to it."""

    command: RawMessage
    answer: RawMessage


def exchanges() -> Iterator[Exchange]:
    """Yield the exchanges of the Java agent's conversations."""
    for name, frames in conversations().items():
        if not name.startswith("real-ssvm"):
            continue
        sent = {}
        for recorded in frames:
            frame = recorded.frame()
            if recorded.sender == "server" and frame.is_request:
                sent[frame.sequence] = frame.messages[0]
            elif recorded.sender == "agent" and not frame.is_request and frame.sequence in sent:
                yield Exchange(sent[frame.sequence], frame.messages[0])


EXCHANGES = [each for each in exchanges() if each.command.short in DIFFERENCES]


def _stores(exchange: Exchange) -> set[str]:
    """Return the NFS URLs of a command."""
    found, left = set(), [exchange.command.content]
    while left:
        each = left.pop()
        left += [value for value in each.values() if isinstance(value, dict)]
        found |= {value for name, value in each.items() if name == "_url"}
    return found


def test_all_are_recorded() -> None:
    """The conversations have each command of the table that a real server has sent."""
    recorded = {each.command.short for each in EXCHANGES}
    assert recorded >= set(DIFFERENCES) - {"ListDataStoreObjectsCommand"}
    assert len(EXCHANGES) > 30


@pytest.mark.parametrize("number", range(len(EXCHANGES)))
def test_exchange(broker: Broker, tmp_path: Path, number: int) -> None:
    """In the state of the Java agent, our answer has its class, its fields, and values that no state changes."""
    exchange = EXCHANGES[number]
    recorded = exchange.answer
    zone = Zone(broker, tmp_path, _stores(exchange))
    _prepare(zone, exchange)
    answer = zone.dispatch(_in_that_state(exchange))
    assert answer.short == recorded.short
    assert set(answer.content) == set(recorded.content) - DIFFERENCES[exchange.command.short], exchange
    same = ("result", "_dir", "secUrl", "templateInfos", "downloadStatus", "downloadPct")
    for name in same:
        if recorded.content.get("downloadStatus") == "DOWNLOAD_ERROR" and name == "downloadPct":
            continue  # the Java agent has the percentage at which it failed
        assert answer.content.get(name) == recorded.content.get(name), name
    zone.ledger.close()


def _in_that_state(exchange: Exchange) -> RawMessage:
    """Return the command. The one for a download that has failed would start it again, so return its progress request.

    The Java agent answers after some seconds, when a small download may have failed already.
    """
    command = exchange.command
    if (command.short, exchange.answer.content.get("downloadStatus")) != ("DownloadCommand", "DOWNLOAD_ERROR"):
        return command
    return RawMessage(command.name.replace("Download", "DownloadProgress"), command.content | {"request": "GET_STATUS"})


def _prepare(zone: Zone, exchange: Exchange) -> None:
    """Bring the store and the ledger into the state of the Java agent."""
    fields = exchange.answer.content
    for name, each in (fields.get("templateInfos") or {}).items():
        java_template(zone.store, 1, each["id"], name, each["physicalSize"], Path(each["installPath"]).name)
    if status := fields.get("downloadStatus"):
        command = exchange.command.content
        zone.send("DownloadCommand", **command)
        if status == "DOWNLOADED":
            zone.store_artifact(command["installPath"])
            zone.run(state="succeeded", result={})
        else:
            zone.run(state="failed", error={"message": fields["errorString"]})
