"""Read the file out of a multipart form (RFC 7578) while it arrives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from ssvm_worker.units import KiB

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

#: The most bytes of all parts that are not the file, and of all headers of parts.
_MAX_OTHER_BYTES = 64 * KiB
#: The longest boundary by RFC 2046, 5.1.1.
_MAX_BOUNDARY = 70


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a form. Raise HTTPException 415 for another type of content."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind.strip().lower() != b"multipart/form-data" or not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise HTTPException(415, "Send the file as multipart/form-data\n")
    return boundary


class FileForm:
    """The one file of a form. Parts without a file name are skipped."""

    def __init__(self, boundary: bytes) -> None:
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)
        self._found: list[bytes] = []
        self._header_name, self._header_text = b"", b""
        self._disposition = b""
        self._files = 0
        self._in_file = False
        self._other_bytes = 0
        self._ended = False

    async def file(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the bytes of the file. Raise HTTPException 400 if the form is malformed or has no or several files."""
        async for chunk in chunks:
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise HTTPException(400, f"The form is malformed: {error}\n") from error
            found, self._found = self._found, []
            for each in found:
                yield each
        if not self._ended:
            raise HTTPException(400, "The form has no end\n")
        if not self._files:
            raise HTTPException(422, "The form has no file\n")

    def _part_begin(self) -> None:
        self._disposition, self._in_file = b"", False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_text += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_text
        self._header_name, self._header_text = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._in_file = b"filename" in options
        self._files += self._in_file
        if self._files > 1:
            raise HTTPException(400, "Send one file only\n")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._found.append(data[start:end])
        else:
            self._count(end - start)

    def _end(self) -> None:
        self._ended = True

    def _count(self, size: int) -> None:
        self._other_bytes += size
        if self._other_bytes > _MAX_OTHER_BYTES:
            raise HTTPException(413, "The form has too much besides the file\n")
