"""Errors keep their content on every way between processes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator

import pytest

from ssvm_worker import errors
from ssvm_worker.cli.output import Output
from ssvm_worker.errors import Cancelled, ConfigError, ImageError, Permanent, Retryable, UnsafeImage, WorkerError


def leaves(kind: type[WorkerError] = WorkerError) -> Iterator[type[WorkerError]]:
    """Return all leaf classes of the taxonomy."""
    yield kind
    for each in kind.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from leaves(each)


MADE = [
    kind("user") if issubclass(kind, Cancelled) else kind("What happened", "to this", "Do that") for kind in leaves()
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_round_trips(error: WorkerError) -> None:
    """An error that Celery rebuilds from its args, by JSON or pickle, has the same content."""
    rebuilt = type(error)(*json.loads(json.dumps(error.args)))
    for other in (rebuilt, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert (str(other), other.args, other.as_dict()) == (str(error), error.args, error.as_dict())


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_one_answer(error: WorkerError) -> None:
    """Every error is one of three: try again (75), permanent (1, or 2 for settings), or stopped (130)."""
    codes = {Retryable: 75, ConfigError: 2, Permanent: 1, Cancelled: 130}
    expected = next((code for kind, code in codes.items() if isinstance(error, kind)), 1)
    assert error.exit_code == expected
    assert error.retryable == isinstance(error, Retryable) == error.as_dict()["retryable"]


@pytest.mark.parametrize("words", ["\x1b[2J", "\r\nINFO job stored", "\x9b2J", "\x7f\0\a", "\u2028\u202e", "\ud800"])
def test_one_line(words: str) -> None:
    """An error is one printable line for any text of a peer, and its other text is unchanged."""
    error = UnsafeImage(f"Größe {words}", f"http://x/{words}", f"Mend {words}")
    assert all(each.isprintable() for each in (str(error), *error.args, error.what, error.where, error.remedy))
    assert type(error)(*error.args).args == error.args
    assert error.what.startswith("Größe ")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("It broke",), "It broke"),
        (("It broke", "disk-0"), "It broke [disk-0]"),
        (("It broke", "", "Mend it"), "It broke. Mend it"),
        (("It broke", "disk-0", "Mend it"), "It broke [disk-0]. Mend it"),
        (("Which?", "", "That one"), "Which? That one"),
    ],
    ids=["what", "what and where", "what and remedy", "all three", "a question"],
)
def test_text(args: tuple[str, ...], text: str) -> None:
    """The text names the problem, the object and the remedy."""
    assert str(WorkerError(*args)) == WorkerError(*args).as_dict()["message"] == text


@pytest.mark.parametrize("reason", ["user", "shutdown", "deadline", "fenced", "something else"])
def test_cancelled(reason: str) -> None:
    """A cancel keeps its reason and shows it."""
    error = pickle.loads(pickle.dumps(Cancelled(reason)))
    assert error.reason == reason
    assert "Cancelled" not in error.what, "the class is told before it already"


def test_error_object() -> None:
    """The error object of a job record has the class, the three parts and whether a retry may help."""
    assert UnsafeImage("Backing file", "url", "Flatten it").as_dict() == {
        "error": "UnsafeImage",
        "what": "Backing file",
        "where": "url",
        "remedy": "Flatten it",
        "retryable": False,
        "message": "Backing file [url]. Flatten it",
    }
    assert issubclass(UnsafeImage, ImageError)


def test_cancel_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The class and the text of a cancel together say once that the job was cancelled."""
    Output(as_json=False).error(Cancelled("user"))
    assert capsys.readouterr().err == "ssvm: Cancelled: Stopped by a user\n"
