"""Run the commands of a management server in threads: many at once, each with at most one answer."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from .command_log import describe
from .deadlines import AfterBurst
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
#: Sends the responses to commands of one connection.
Respond = Callable[[Sequence[Frame]], None]
#: Called after each command: the short name of its class, the result, and the seconds to the answer.
Observer = Callable[[str, bool, float], None]


def failed(text: str) -> RawMessage:
    """Return an answer that every server understands as a failure."""
    return RawMessage(_ANSWER, {"result": False, "details": text}).completed()


@dataclass(eq=False)
class OpenCommand:
    """A frame with commands whose answer has not been sent."""

    frame: Frame
    answer: Respond
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
    a hundred threads nor a hundred requests to the broker. Their lines in the log are written after the burst.
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
        self._joint, self._joint_busy, self._waiting = _Threads(_JOINT_THREADS), 0, deque[OpenCommand]()
        self._later = AfterBurst("command log")
        self._parallel, self._sequence = _Threads(threads), _Threads(_SEQUENCE_THREADS)
        self._open: set[OpenCommand] = set()
        self._changed = threading.Condition()

    @property
    def open_count(self) -> int:
        """Return the number of commands without an answer."""
        return len(self._open)

    def run(self, frame: Frame, answer: Respond) -> None:
        """Run the commands of a frame in a thread, and call *answer* with the response, once."""
        command, needed = OpenCommand(frame, answer), False
        is_alone = len(frame.messages) == 1 and not frame.in_sequence
        is_joint = self._joint_handler is not None and is_alone and frame.messages[0].short in _JOINT
        with self._changed:
            self._open.add(command)
            if is_joint:
                self._waiting.append(command)
                needed = self._joint_busy < _JOINT_THREADS
                self._joint_busy += needed
        if not is_joint:
            for each in frame.messages:
                _log.info("← #%d %s", frame.number, describe(each))
            self._start(command)
            return
        if needed:
            self._joint.submit(self._answer_waiting)
        self._later.put(partial(_log_at, time.time(), "← #%d %s", frame.number, frame.messages[0]))

    def expire(self) -> None:
        """Answer setup commands that run for too long with a failure. Call this every second or so."""
        now = time.monotonic()
        with self._changed:
            late = [each for each in self._open if each.is_setup and now - each.started > self._setup_s]
        for command in late:
            text = f"The agent has no result after {self._setup_s:g} s. See its log"
            self._answer([(command, [failed(text) for _ in command.frame.messages])])

    def wait_setup(self, seconds: float) -> bool:
        """Wait until no setup command is open. Return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(each.is_setup for each in self._open), seconds)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no command is open, and the log has all lines. Return whether no command is open."""
        with self._changed:
            is_idle = self._changed.wait_for(lambda: not self._open, seconds)
        self._later.wait(seconds)
        return is_idle

    def _start(self, command: OpenCommand) -> None:
        threads = self._sequence if command.frame.in_sequence or command.is_setup else self._parallel
        threads.submit(lambda: self._answer([(command, list(self._messages(command.frame)))]))

    def _answer_waiting(self) -> None:
        """Answer the joint commands until none waits."""
        while True:
            with self._changed:
                commands = [self._waiting.popleft() for _ in range(min(_MAX_JOINT, len(self._waiting)))]
                if not commands:
                    self._joint_busy -= 1
                    return
            try:
                self._answer_joint(commands)
            except Exception:  # noqa: BLE001 - the thread must go on
                _log.exception("an answer failed because of a bug")

    def _answer_joint(self, commands: Sequence[OpenCommand]) -> None:
        """Answer the commands together. Start a thread for each one that needs it."""
        assert self._joint_handler
        messages = [each.frame.messages[0] for each in commands]
        try:
            answers = self._joint_handler(messages)
        except Exception:  # noqa: BLE001 - each command still gets its own answer
            _log.exception("commands were not answered together because of a bug")
            answers = [None] * len(commands)
        found = list(zip(commands, messages, answers, strict=True))
        self._answer([(command, (answer,)) for command, _, answer in found if answer])
        for command, message, answer in found:
            if answer is None:
                self._start(command)
            else:
                seconds = self._note(message, answer, command.started)
                line = "→ #%d %s (to %s, %.3f s)", command.frame.number, answer, message.short, seconds
                self._later.put(partial(_log_at, time.time(), *line))

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
            seconds = self._note(each, answer, started)
            _log.info("→ #%d %s (to %s, %.3f s)", frame.number, describe(answer), each.short, seconds)
            stopped = stopped or (frame.stop_on_error and not answer.content.get("result"))
            yield answer

    def _note(self, message: RawMessage, answer: RawMessage, started: float) -> float:
        """Call the observer. Return the seconds to the answer."""
        seconds = time.monotonic() - started
        self._observer(message.short, bool(answer.content.get("result")), seconds)
        return seconds

    def _answer(self, given: Sequence[tuple[OpenCommand, Sequence[RawMessage]]]) -> None:
        """Send the answers, those of one connection together."""
        by_connection: dict[Respond, list[Frame]] = {}
        with self._changed:
            for command, answers in given:
                if not command.answered:  # else it has expired meanwhile
                    command.answered = True
                    self._open.discard(command)
                    by_connection.setdefault(command.answer, []).append(command.frame.answered(answers))
            self._changed.notify_all()
        for answer, frames in by_connection.items():
            answer(frames)


def _log_at(when: float, text: str, number: int, message: RawMessage, *more: object) -> None:
    """Write a line to the log with the time at which it happened."""
    if _log.isEnabledFor(logging.INFO):
        record = _log.makeRecord(_log.name, logging.INFO, "", 0, text, (number, describe(message), *more), None)
        record.created, record.msecs = when, int(when % 1 * 1000)
        _log.handle(record)


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
