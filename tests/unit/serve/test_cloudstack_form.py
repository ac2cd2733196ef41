"""The file of a form is received in pieces of any size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from ssvm_worker.serve.cloudstack.form import FileForm, boundary_of

_LIMIT = 64 << 10


def read(pieces: list[bytes], boundary: bytes = b"B") -> bytes:
    """Return the file of a form."""

    async def chunks() -> AsyncIterator[bytes]:
        for each in pieces:
            yield each

    async def file() -> bytes:
        return b"".join([each async for each in FileForm(boundary).file(chunks())])

    return asyncio.run(file())


def form(data: bytes, *, before: bytes = b"", headers: bytes = b"") -> bytes:
    disposition = b'Content-Disposition: form-data; name="files[]"; filename="a.raw"\r\n'
    return before + b"--B\r\n" + disposition + headers + b"\r\n" + data + b"\r\n--B--\r\n"


PARTS = [b"\r", b"\n", b"-", b"--", b"B", b"\r\n--", b"\r\n--C", b"x" * 100, b"\0"]
DATA = st.lists(st.sampled_from(PARTS)).map(b"".join)


@given(DATA.filter(lambda data: b"\r\n--B" not in b"\r\n" + data), st.lists(st.integers(1, 50)))
def test_pieces(data: bytes, sizes: list[int]) -> None:
    """The bytes of the file are the same for all pieces of the form."""
    body, pieces = form(data), []
    for size in [*sizes, len(body) + 1_000_000]:
        pieces.append(body[:size])
        body = body[size:]
    assert read([each for each in pieces if each]) == data


def test_other_fields() -> None:
    """Fields without a file name are skipped."""
    field = b'--B\r\nContent-Disposition: form-data; name="comment"\r\n\r\nhello\r\n'
    assert read([form(b"data", before=field)]) == b"data"


@pytest.mark.parametrize(
    "body",
    [
        form(b"data", headers=b"X: " + b"x" * _LIMIT + b"\r\n"),
        form(b"data", headers=b"X: y\r\n" * _LIMIT),
        b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * (_LIMIT + 1) + b"\r\n--B--\r\n",
    ],
)
def test_too_much_besides_the_file(body: bytes) -> None:
    """Headers and fields have a limit, so that a form without a file uses no memory."""
    with pytest.raises(HTTPException) as caught:
        read([body[start : start + 1000] for start in range(0, len(body), 1000)])
    assert caught.value.status_code in (400, 413)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary=", "a;boundary=x"]
)
def test_other_types(kind: str) -> None:
    """Only a multipart form with a boundary is accepted."""
    with pytest.raises(HTTPException) as caught:
        boundary_of(kind)
    assert caught.value.status_code == 415


def test_boundary() -> None:
    """The boundary may be quoted, and has the limit of RFC 2046."""
    assert boundary_of(f'multipart/form-data; boundary="{"b" * 70}"') == b"b" * 70
    with pytest.raises(HTTPException):
        boundary_of(f"multipart/form-data; boundary={'b' * 71}")
