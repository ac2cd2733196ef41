"""A bad value in any field of any command gets one answer: no bug, no file outside the store, no secret in a log."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cloudstack import jobs_to_end
from ssvm_worker.cloudstack.command_log import describe
from ssvm_worker.cloudstack.commands import HANDLERS, deletes
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.errors import ResourceBusy
from ssvm_worker.wiring.assembly import shown
from tests.servers.broker import StoppableBroker
from tests.unit.cloudstack.recorded import DATA

from .agents import PLACE, Agent, settings_of

#: Written over every string of the commands that a log must not show.
SECRET = "hunter2-is-secret"
_SECRET_FIELDS = {
    "secretKey",
    "accessKey",
    "password",
    "_password",
    "copyPassword",
    "privKey",
    "postUploadKey",
    "isoData",
}
BAD: list[Any] = [
    None,
    True,
    -1,
    1 << 70,
    1.5,
    "",
    "x" * 70_000,
    "NOT_A_VALUE",
    "../../etc/passwd",
    "/etc/passwd",
    "template/tmpl/../../../x",
    "snapshots/2/31/../../../../x",
    "a\x00b",
    "a\nb\x1b[2J",
    "\ud800",
    "nfs://192.0.2.99/export/sec1",
    "nfs://192.0.2.10/export/sec1/../../etc",
    "file:///etc/passwd",
    "store:primary/template/tmpl/1/1/x",
    "http://169.254.169.254/latest/meta-data",
    "http://[::1",
    "$(touch pwned)",
    [],
    {},
    [None],
    {"a": 1, "b": 2},
    {"com.cloud.agent.api.to.EvilTO": {}},
    json.loads("[" * 60 + "]" * 60),
]


def _commands() -> list[RawMessage]:
    found: dict[str, RawMessage] = {}
    for file in sorted((DATA / "vectors").glob("req-*.json")):
        for each in json.loads(json.loads(file.read_text())["content"]):
            ((name, fields),) = each.items()
            short = name.rpartition(".")[2]
            if short in HANDLERS:
                found.setdefault(f"{short} {sorted(fields)}", RawMessage(name, fields))
    return list(found.values())


COMMANDS = _commands()


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value inside a command."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*at, key)
        yield from _paths(each, (*at, key))


def _changed(fields: Any, path: tuple[Any, ...], value: Any) -> Any:
    twin = copy.deepcopy(fields)
    inner = twin
    for each in path[:-1]:
        inner = inner[each]
    inner[path[-1]] = value
    return twin


def _with_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_secrets(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: SECRET if name in _SECRET_FIELDS else _with_secrets(each) for name, each in value.items()}


@pytest.fixture(scope="module")
def zone(session_broker: StoppableBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent whose jobs no worker runs, so that no command waits for one."""
    directory = tmp_path_factory.mktemp("hostile")
    section = {
        "stores": {PLACE: "primary"},
        "allow_stores": ["s3://unknown.invalid/*"],
        "web_root": str(directory / "www"),
    }

    def at_once(_: Any, job_id: str, __: float) -> Any:
        raise ResourceBusy("No worker runs in this test", job_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_to_end, "wait_for_job", at_once)
        patch.setattr(deletes, "wait_for_job", at_once)
        yield Agent(settings_of(session_broker.with_prefix("hostile:"), directory, cloudstack=section))


def _files(zone: Agent) -> set[str]:
    """Return the files outside the places that the agent may write: its store, its state, and Apache's root."""
    top = Path(zone.services.settings.state_dir).parent
    return {each.name for each in top.iterdir()} - {"store", "state", "www"}


def test_all_commands() -> None:
    """The table has every command, apart from those without fields."""
    assert {each.short for each in COMMANDS} == set(HANDLERS) - {"UploadCommand"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.short)
def test_bad_fields(zone: Agent, command: RawMessage, caplog: pytest.LogCaptureFixture) -> None:
    """Any value in any field gets one answer that is valid on the wire, and no bug."""
    caplog.set_level(logging.WARNING)
    for path in _paths(command.content):
        for value in BAD:
            message = RawMessage(command.name, _changed(command.content, path, value))
            answer = zone.dispatch(message)
            text = json.dumps(answer.content)
            assert "The agent has a bug" not in text, (path, value, caplog.text[-3000:])
            assert isinstance(answer.content["result"], bool)
            assert len(text) < 300_000
            assert describe(message).isprintable()
            assert describe(answer).isprintable()
    assert not _files(zone)
    assert not Path("pwned").exists()
    assert not any(each.exc_info for each in caplog.records)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each.short)
def test_secrets(zone: Agent, command: RawMessage, caplog: pytest.LogCaptureFixture) -> None:
    """No log line, answer or record has a secret of a command, also if another field of it is wrong."""
    caplog.set_level(logging.DEBUG)
    fields = _with_secrets(command.content) | {"contextMap": {"password": SECRET, "username": SECRET}}
    places = [each for each in _paths(fields) if each[-1] in _SECRET_FIELDS]
    wrong = [_changed(fields, each, value) for each in places for value in ([SECRET], {"a": SECRET})]
    for changed in (fields, fields | {"wait": "soon"}, *wrong):
        message = RawMessage(command.name, changed)
        answer = zone.dispatch(message)
        assert SECRET not in json.dumps(answer.content)
        assert SECRET not in describe(message) + describe(answer)
    assert SECRET not in caplog.text
    assert SECRET not in json.dumps([shown(each) for each in zone.services.jobs.jobs(limit=1000)])


def test_one_bad_command(zone: Agent) -> None:
    """After all of this, a good command gets its good answer."""
    assert zone.send("CheckHealthCommand")["result"] is True
    assert zone.send("ListTemplateCommand", store={"com.cloud.agent.api.to.NfsTO": {"_url": PLACE}})["result"] is True


def _answers(zone: Agent, caplog: pytest.LogCaptureFixture) -> dict[str, bool]:
    """Return the results of all commands. None of them may be a bug."""
    results = {}
    for command in COMMANDS:
        answer = zone.dispatch(command)
        assert "The agent has a bug" not in json.dumps(answer.content), (command.short, caplog.text[-3000:])
        if command.short in ("ListTemplateCommand", "ListVolumeCommand") and not answer.content["result"]:
            assert "templateInfos" not in answer.content
        if answer.content.get("downloadStatus"):
            assert answer.content["downloadStatus"] != "UNKNOWN"
        results[command.short] = answer.content["result"]
    return results


def test_broker_away(stoppable_broker: StoppableBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the broker is away, each command gets an answer, and a good one after it has come back."""
    zone = Agent(settings_of(stoppable_broker.with_prefix("away:"), tmp_path))
    stoppable_broker.stop()
    results = _answers(zone, caplog)
    assert results["CheckHealthCommand"] is True
    assert results["SecStorageSetupCommand"] is False
    stoppable_broker.start()
    assert zone.send("ListTemplateCommand", store={"com.cloud.agent.api.to.NfsTO": {"_url": PLACE}})["result"] is True


def test_full_broker(stoppable_broker: StoppableBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the broker has no memory, each command gets an answer, and no download seems to be queued."""
    broker = stoppable_broker.with_prefix("full:")
    zone = Agent(settings_of(broker, tmp_path))
    broker.client().config_set("maxmemory", 1)
    _answers(zone, caplog)
    assert zone.services.jobs.jobs() == []
    broker.client().config_set("maxmemory", 0)
    assert zone.send("ListTemplateCommand", store={"com.cloud.agent.api.to.NfsTO": {"_url": PLACE}})["result"] is True
