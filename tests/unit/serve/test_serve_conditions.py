"""Conditional and range requests, by the tables of RFC 9110."""

from __future__ import annotations

import pytest

from ssvm_worker.serve.conditional import ConditionalAnswer, ObjectVersion, answer

#: Modified on Sun, 06 Nov 1994 08:49:37 GMT, the date of the RFC's own examples.
IT = ObjectVersion('"sha256:aa"', 1000, 784111777)
SAME, EARLIER, LATER = (f"Sun, 06 Nov 1994 08:49:{second} GMT" for second in (37, 36, 38))
WHOLE = ConditionalAnswer(200, 0, 1000)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bytes=0-0", ConditionalAnswer(206, 0, 1)),
        ("bytes=0-", ConditionalAnswer(206, 0, 1000)),
        ("bytes=10-19", ConditionalAnswer(206, 10, 10)),
        ("bytes=999-", ConditionalAnswer(206, 999, 1)),
        ("bytes=990-5000", ConditionalAnswer(206, 990, 10)),
        ("bytes=-1", ConditionalAnswer(206, 999, 1)),
        ("bytes=-5000", ConditionalAnswer(206, 0, 1000)),
        ("bytes=-0", ConditionalAnswer(416)),
        ("bytes=1000-", ConditionalAnswer(416)),
        ("bytes=" + "9" * 5000 + "-", ConditionalAnswer(416)),
        ("bytes=5-4", WHOLE),
        ("bytes=-", WHOLE),
        ("bytes=a-b", WHOLE),
        ("bytes=0-1,5-6", WHOLE),
        ("lines=0-1", WHOLE),
        ("", WHOLE),
    ],
)
def test_range(given: str, expected: ConditionalAnswer) -> None:
    """One range gives its bytes, one after the end gives 416, and an unsupported one gives all bytes."""
    assert answer("GET", {"range": given}, IT) == expected


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if-match": '"sha256:aa"'}, 200),
        ({"if-match": '"x", "sha256:aa"'}, 200),
        ({"if-match": "*"}, 200),
        ({"if-match": '"x"'}, 412),
        ({"if-match": 'W/"sha256:aa"'}, 412),
        ({"if-match": '"sha256:aa"', "if-unmodified-since": EARLIER}, 200),
        ({"if-unmodified-since": SAME}, 200),
        ({"if-unmodified-since": EARLIER}, 412),
        ({"if-unmodified-since": "yesterday"}, 200),
        ({"if-none-match": '"sha256:aa"'}, 304),
        ({"if-none-match": 'W/"sha256:aa"'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"x"'}, 200),
        ({"if-none-match": '"x"', "if-modified-since": LATER}, 200),
        ({"if-modified-since": SAME}, 304),
        ({"if-modified-since": LATER}, 304),
        ({"if-modified-since": EARLIER}, 200),
        ({"if-modified-since": "now"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_precondition(method: str, headers: dict[str, str], status: int) -> None:
    """Tags precede dates, a weak tag never matches If-Match, and an invalid date is ignored."""
    assert answer(method, headers, IT).status == status


@pytest.mark.parametrize(
    ("condition", "status"),
    [('"sha256:aa"', 206), ('"x"', 200), ('W/"sha256:aa"', 200), (SAME, 206), (LATER, 200), (EARLIER, 200)],
)
def test_if_range(condition: str, status: int) -> None:
    """A range is sent only from the version that the client has."""
    assert answer("GET", {"range": "bytes=5-9", "if-range": condition}, IT).status == status


def test_head_has_no_range() -> None:
    """RFC 9110 defines ranges for GET alone."""
    assert answer("HEAD", {"range": "bytes=5-9"}, IT) == WHOLE


def test_precondition_before_range() -> None:
    """A precondition is checked before the range."""
    assert answer("GET", {"range": "bytes=5000-", "if-match": '"x"'}, IT).status == 412
