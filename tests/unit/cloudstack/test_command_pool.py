"""The commands that a pool answers together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from ssvm_worker.cloudstack.command_pool import CommandPool
from ssvm_worker.cloudstack.frame import REQUEST, Frame, RawMessage
from tests.waiting import PATIENCE_S, until


def answer(text: str) -> RawMessage:
    return RawMessage("com.cloud.agent.api.Answer", {"result": True, "details": text})


@pytest.mark.parametrize("has_bug", [False, True])
def test_joint(has_bug: bool) -> None:
    """One thread offers all DownloadCommands that wait to the joint handler; the others get threads of their own."""
    calls: list[int] = []
    found: dict[int, str] = {}
    release = threading.Event()

    def joint(messages: Sequence[RawMessage]) -> list[RawMessage | None]:
        calls.append(len(messages))
        assert release.wait(PATIENCE_S)
        if has_bug:
            raise ZeroDivisionError
        return [None if each.content["id"] == 3 else answer("together") for each in messages]

    def note(response: Frame) -> None:
        found[response.sequence] = response.messages[0].content["details"]

    pool = CommandPool(lambda _: answer("alone"), joint=joint)
    pool.run(Frame(REQUEST, 0, (RawMessage("x.DownloadCommand", {"id": 0}),)), note)
    until(lambda: calls == [1], "the first command is in work")
    for number in range(1, 6):
        pool.run(Frame(REQUEST, number, (RawMessage("x.DownloadCommand", {"id": number}),)), note)
    pool.run(Frame(REQUEST, 6, (RawMessage("x.DeleteCommand"),)), note)
    until(lambda: 6 in found, "another command does not wait")
    release.set()
    assert pool.wait_idle(PATIENCE_S)
    until(lambda: len(found) == 7, "all answers")
    assert calls == [1, 5]
    alone = set(range(7)) if has_bug else {3, 6}
    assert {number for number, text in found.items() if text == "alone"} == alone
