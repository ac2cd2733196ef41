"""The commands that a pool answers together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from ssvm_worker.cloudstack.command_pool import CommandPool
from ssvm_worker.cloudstack.frame import IN_SEQUENCE, REQUEST, Frame, RawMessage
from tests.waiting import PATIENCE_S, until


def answer(text: str) -> RawMessage:
    return RawMessage("com.cloud.agent.api.Answer", {"result": True, "details": text})


@pytest.mark.parametrize("has_bug", [False, True])
def test_joint(has_bug: bool) -> None:
    """Two threads offer all DownloadCommands that wait to the joint handler; the others get threads of their own."""
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
    frames = [Frame(REQUEST, number, (RawMessage("x.DownloadCommand", {"id": number}),)) for number in range(7)]
    pool.run(frames[0], note)
    until(lambda: calls == [1], "a thread has a command")
    pool.run(frames[1], note)
    until(lambda: calls == [1, 1], "the other thread has a command")
    for frame in frames[2:]:
        pool.run(frame, note)
    pool.run(Frame(REQUEST, 7, (RawMessage("x.DeleteCommand"),)), note)
    pool.run(Frame(REQUEST | IN_SEQUENCE, 8, (RawMessage("x.DownloadCommand", {"id": 8}),)), note)
    until(lambda: {7, 8} <= set(found), "another command does not wait, nor does one with an order")
    release.set()
    assert pool.wait_idle(PATIENCE_S)
    until(lambda: len(found) == 9, "all answers")
    assert sum(calls) == 7
    assert len(calls) <= 4, "each thread takes what waits at once"
    alone = set(range(9)) if has_bug else {3, 7, 8}
    assert {number for number, text in found.items() if text == "alone"} == alone
