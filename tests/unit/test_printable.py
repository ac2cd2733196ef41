"""Outside text reaches terminals and logs without escape sequences and forged lines."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.cli.output import Output
from ssvm_worker.cli.progress import Bar
from ssvm_worker.cli.queue import _ending
from ssvm_worker.config.schema import LogSection
from ssvm_worker.errors import SourceDenied
from ssvm_worker.operations import logs
from ssvm_worker.units import printable

UNSAFE = "\x00\x07\x08\x1b\x7f\x80\x9b\x9f\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ud800\udfff\r"
HOSTILE = f"550 no{UNSAFE}\n2026-11-28 00:00:00,000 INFO job victim succeeded"


@given(st.text(st.characters(exclude_categories=())))
def test_json_keeps_its_meaning(text: str) -> None:
    """Printable JSON has the same value, and has a UTF-8 form."""
    shown = printable(json.dumps([text], ensure_ascii=False))
    assert json.loads(shown) == [text]
    assert not set(shown.encode().decode()) & set(UNSAFE)


def test_what_is_kept() -> None:
    """Letters of all scripts are kept, and line breaks where the program wrote them."""
    assert printable("Ü 漢 é\n\t", keep="\n") == "Ü 漢 é\n\\u0009"


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the output, which has no line of foreign text."""
    text = "".join(capsys.readouterr())
    assert not set(text) & set(UNSAFE)
    assert "\n2026" not in text
    return text


@pytest.mark.parametrize("as_json", [True, False])
def test_output(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    """Results, tables and errors are printed in the program's own lines, for any content."""
    output = Output(as_json=as_json)
    output.result({"a": HOSTILE, "b": [HOSTILE], "c": {"d": HOSTILE}})
    output.table([{"a": HOSTILE, "b": {"c": HOSTILE}}], ("a", "b"), "none")
    output.error(SourceDenied(HOSTILE, HOSTILE, HOSTILE))
    assert "550 no" in shown(capsys)


@pytest.mark.parametrize("state", ["failed", "succeeded"])
def test_ending(capsys: pytest.CaptureFixture[str], state: str) -> None:
    """The end of a job is printed in the program's own lines."""
    error = {"error": "SourceDenied", "message": HOSTILE}
    record: dict[str, Any] = {"state": state, "job_id": "j", "result": {"url": HOSTILE}, "error": error}
    Output(as_json=False).result(record, _ending(record))
    assert "550 no" in shown(capsys)


def test_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar's label and stage cannot control the terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Bar(HOSTILE)
    bar.show({"stage": HOSTILE, "bytes": 5, "total": 10})
    bar.close()
    text = capsys.readouterr().err
    assert "550 no" in text
    assert not set(text) & (set(UNSAFE) - {"\r"})


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Return the log's stream."""
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield io.StringIO()
    logging.basicConfig(handlers=handlers, level=level, force=True)


@pytest.mark.parametrize("form", ["text", "json", "keyvalue"])
def test_log(stream: io.StringIO, form: Any) -> None:
    """A log entry is one line in each form, and a traceback's lines cannot imitate one."""
    logs.start(LogSection(format=form), stream=stream)
    log = logging.getLogger("ssvm.test")
    log.warning("the server said: %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("a bug: %s", HOSTILE)
    text = stream.getvalue()
    assert not set(text) & set(UNSAFE)
    assert "\n2026-11-28 00:00:00,000 INFO" not in text
    assert len([each for each in text.splitlines() if not each.startswith("  ")]) == 2
