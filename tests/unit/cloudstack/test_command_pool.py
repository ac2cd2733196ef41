"""The commands that a pool answers together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import pytest

from ssvm_worker.cloudstack.command_pool import CommandPool
from ssvm_worker.cloudstack.deadlines import AfterBurst
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

    def note(responses: Sequence[Frame]) -> None:
        for each in responses:
            found[each.sequence] = each.messages[0].content["details"]

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


def test_answers_of_a_connection(caplog: pytest.LogCaptureFixture) -> None:
    """Answers that are ready together are one call for each connection, and the log has their own times later."""
    caplog.set_level(logging.INFO)
    begun, release = threading.Semaphore(0), threading.Event()

    def joint(messages: Sequence[RawMessage]) -> list[RawMessage | None]:
        begun.release()
        assert release.wait(PATIENCE_S)
        return [answer("together") for _ in messages]

    first: list[list[int]] = []
    second: list[list[int]] = []
    pool = CommandPool(lambda _: answer("alone"), joint=joint)
    to_first = lambda found: first.append([each.sequence for each in found])  # noqa: E731 - must be the same object
    to_second = lambda found: second.append([each.sequence for each in found])  # noqa: E731
    started = time.time()
    for number in range(7):
        pool.run(Frame(REQUEST, number, (RawMessage("x.DownloadCommand"),)), to_second if number == 4 else to_first)
        if number < 2:
            assert begun.acquire(timeout=PATIENCE_S)
    sent = time.time()
    release.set()
    assert pool.wait_idle(PATIENCE_S)
    until(lambda: sum(map(len, first)) == 6, "all answers")
    assert [2, 3, 5, 6] in first
    assert second == [[4]]
    lines = [each for each in caplog.records if each.name == "ssvm.agent"]
    received = [each for each in lines if each.message.startswith("←")]
    assert [each.message for each in received] == [f"← #{number} DownloadCommand" for number in range(7)]
    assert all(started - 0.001 <= each.created <= sent for each in received)
    until(lambda: sum("together" in each.message for each in caplog.records) == 7, "a line for each answer")


def test_after_burst(caplog: pytest.LogCaptureFixture) -> None:
    """Work is done in its order, also after work that failed, and a caller can wait for it."""
    later, found = AfterBurst("later"), list[int]()
    for number in range(5):
        later.put(lambda number=number: found.append(1 // (number - 1)))  # type: ignore[misc]
    assert later.wait(PATIENCE_S)
    assert found == [-1, 1, 0, 0]
    assert "ZeroDivisionError" in caplog.text
    release = threading.Event()
    later.put(release.wait)
    assert not later.wait(0)
    release.set()
    assert later.wait(PATIENCE_S)
