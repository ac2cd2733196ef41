"""Run the commands of a management server in threads: many at once, each with at most one answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .command_log import describe
from .frame import Frame, Handler, RawMessage

_log = logging.getLogger("ssvm.agent")

_ANSWER = "com.cloud.agent.api.Answer"
#: Commands of which the server sends the next only after the answer, before the host is Up. While they wait, the
#: server holds the lock of the host, so even a lost connection does not end them.
SETUP = frozenset({"SecStorageSetupCommand", "SecStorageFirewallCfgCommand", "SecStorageVMSetupCommand"})
#: Threads for commands in sequence. The server sends the next one only after the answer, or after its own time limit.
_SEQUENCE_THREADS = 8

#: Commands of which a server sends many at once, for example after its start.
_JOINT = frozenset({"DownloadCommand"})
#: The most of them that are answered together, because the first answer waits for the others. And the threads for
#: that: one prepares the next request while the other waits for the broker.
_MAX_JOINT, _JOINT_THREADS = 16, 2

#: Answers several commands of _JOINT with one request to the broker. None: the command needs a thread.
JointHandler = Callable[[Sequence[RawMessage]], Sequence[RawMessage | None]]
#: Called after each command: the short name of its class, the result, and the seconds to the answer.
Observer = Callable[[str, bool, float], None]


def failed(text: str) -> RawMessage:
    """Return an answer that every server understands as a failure."""
    return RawMessage(_ANSWER, {"result": False, "details": text}).completed()


@dataclass(eq=False)
class OpenCommand:
    """A frame with commands whose answer has not been sent."""

    frame: Frame
    answer: Callable[[Frame], None]
    started: float = field(default_factory=time.monotonic)
    answered: bool = False

    @property
    def is_setup(self) -> bool:
        """Return whether the server blocks the host until the answer."""
        return any(each.short in SETUP for each in self.frame.messages)


class CommandPool:
    """Runs commands through a handler. Safe to share between threads.

    Commands in sequence have their own threads. So a hundred slow downloads do not delay the setup of a host.
    The server keeps the order of these commands: it sends the next one after the answer.
    With a *joint* handler, two threads first offer it all DownloadCommands that wait. So a hundred of them cost neither
    a hundred threads nor a hundred requests to the broker.
    """

    def __init__(
        self,
        handler: Handler,
        observer: Observer = lambda *_: None,
        joint: JointHandler | None = None,
        *,
        threads: int = 128,
        setup_s: float = 20.0,
    ) -> None:
        """Store the limits: *threads* for commands at once, and *setup_s* seconds until a setup command has failed."""
        self._handler, self._observer, self._joint_handler, self._setup_s = handler, observer, joint, setup_s
        self._joint, self._waiting = _Threads(_JOINT_THREADS), deque[OpenCommand]()
        self._parallel, self._sequence = _Threads(threads), _Threads(_SEQUENCE_THREADS)
        self._open: set[OpenCommand] = set()
        self._changed = threading.Condition()

    @property
    def open_count(self) -> int:
        """Return the number of commands without an answer."""
        return len(self._open)

    def run(self, frame: Frame, answer: Callable[[Frame], None]) -> None:
        """Run the commands of a frame in a thread, and call *answer* with the response, once."""
        command = OpenCommand(frame, answer)
        with self._changed:
            self._open.add(command)
        is_joint = len(frame.messages) == 1 and frame.messages[0].short in _JOINT and not frame.in_sequence
        if self._joint_handler and is_joint:
            self._waiting.append(command)
            self._joint.submit(self._answer_joint)
        else:
            self._start(command)

    def expire(self) -> None:
        """Answer setup commands that run for too long with a failure. Call this every second or so."""
        now = time.monotonic()
        with self._changed:
            late = [each for each in self._open if each.is_setup and now - each.started > self._setup_s]
        for command in late:
            text = f"The agent has no result after {self._setup_s:g} s. See its log"
            self._answer(command, iter([failed(text) for _ in command.frame.messages]))

    def wait_setup(self, seconds: float) -> bool:
        """Wait until no setup command is open. Return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(each.is_setup for each in self._open), seconds)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no command is open. Return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, seconds)

    def _start(self, command: OpenCommand) -> None:
        threads = self._sequence if command.frame.in_sequence or command.is_setup else self._parallel
        threads.submit(lambda: self._answer(command, self._messages(command.frame)))

    def _answer_joint(self) -> None:
        """Answer the commands that wait. Start a thread for each other one."""
        assert self._joint_handler
        commands: list[OpenCommand] = []
        with suppress(IndexError):  # the queue is empty
            while len(commands) < _MAX_JOINT:
                commands.append(self._waiting.popleft())
        if not commands:
            return  # an earlier call has answered them
        started = time.monotonic()
        messages = [each.frame.messages[0] for each in commands]
        try:
            answers = self._joint_handler(messages)
        except Exception:  # noqa: BLE001 - each command still gets its own answer
            _log.exception("commands were not answered together because of a bug")
            answers = [None] * len(commands)
        for command, message, answer in zip(commands, messages, answers, strict=True):
            if answer is None:
                self._start(command)
            else:
                self._note(message, command.frame.number, answer, started)
                self._answer(command, iter((answer,)))

    def _messages(self, frame: Frame) -> Iterator[RawMessage]:
        """Yield the answer to each command. With STOP_ON_ERROR, a failure ends those after it."""
        stopped = False
        for each in frame.messages:
            started = time.monotonic()
            try:
                answer = failed("Stopped by previous failure") if stopped else self._handler(each)
            except Exception as error:  # noqa: BLE001 - without an answer the server would wait for an hour
                _log.exception("%s failed because of a bug", each.short)
                answer = failed(f"The agent has a bug ({type(error).__name__}): see its log")
            self._note(each, frame.number, answer, started)
            stopped = stopped or (frame.stop_on_error and not answer.content.get("result"))
            yield answer

    def _note(self, message: RawMessage, number: int, answer: RawMessage, started: float) -> None:
        seconds = time.monotonic() - started
        _log.info("→ #%d %s (to %s, %.3f s)", number, describe(answer), message.short, seconds)
        self._observer(message.short, bool(answer.content.get("result")), seconds)

    def _answer(self, command: OpenCommand, answers: Iterator[RawMessage]) -> None:
        found: Sequence[RawMessage] = list(answers)
        with self._changed:
            if command.answered:
                return  # it has expired meanwhile
            command.answered = True
            self._open.discard(command)
            self._changed.notify_all()
        command.answer(command.frame.answered(found))


class _Threads:
    """A pool of daemon threads that starts them on demand. A hung command does not prevent the end of the process."""

    def __init__(self, limit: int) -> None:
        self._limit, self._started, self._idle = limit, 0, 0
        self._queue: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()

    def submit(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._queue.append(work)
            if len(self._queue) > self._idle and self._started < self._limit:
                self._started += 1
                threading.Thread(target=self._run, name=f"command-{self._started}", daemon=True).start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._queue)
                self._idle -= 1
                work = self._queue.popleft()
            try:
                work()
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("an answer failed because of a bug")
