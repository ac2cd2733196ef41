"""An S3 server that misbehaves on request: a proxy on a real socket before the real one."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.servers.s3 import S3Server
from tests.waiting import PATIENCE_S


@dataclass(frozen=True)
class Call:
    """One request of a client."""

    method: str
    path: str
    query: dict[str, str]
    #: The names are in lower case.
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the call in S3's API."""
        if "partNumber" in self.query:
            copies = "Copy" if "x-amz-copy-source" in self.headers else ""
            return f"UploadPart{copies} {self.query['partNumber']}"
        if "uploads" in self.query:
            return "CreateMultipartUpload" if self.method == "POST" else "ListMultipartUploads"
        if "uploadId" in self.query:
            names = {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}
            return names[self.method]
        if "continuation-token" in self.query:
            return "ListObjectsV2 next"
        return {"GET": "GetObject", "PUT": "PutObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}[self.method]


@dataclass
class Fault:
    """A fault of the calls with one name."""

    name: str
    status: int = 500
    code: str = "InternalError"
    #: The number of calls with the fault.
    times: int = 1 << 30
    #: Whether the real server still gets the call, and only its answer is lost.
    after: bool = False
    #: Close the connection after so many bytes of the real answer's body.
    cut_at: int | None = None
    #: Hold the call until this event is set, and forward it then.
    until: threading.Event | None = None
    #: Forward the call, and omit these headers of its answer. The names are in lower case.
    without: frozenset[str] = frozenset()
    #: Send the whole object, with status 200, for every requested range.
    whole: bool = False
    #: Send the object from this byte, with its Content-Range, for every requested range.
    begins_at: int | None = None
    #: Close the connection without an answer.
    hangs_up: bool = False
    #: Send the body in chunks.
    chunked: bool = False
    #: Send so many bytes of the body, then nothing until this event is set.
    silent_after: int | None = None
    #: Send single bytes now and then, instead of nothing.
    drips: bool = False
    woken: threading.Event = field(default_factory=threading.Event)
    #: The body of the error, instead of XML. The second is the header Retry-After.
    body: bytes | None = None
    retry_after: str = ""


@dataclass
class FaultyS3:
    """A context manager. *faults* may be changed while it runs. *calls* has all received calls.

    It is also an HTTP proxy: a client that uses it needs no name service for a bucket's host.
    """

    server: S3Server
    faults: list[Fault] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def names(self) -> list[str]:
        """Return the names of the received calls."""
        return [each.name for each in self.calls]

    def fault_for(self, call: Call) -> Fault | None:
        """Return the fault of this call, and count it."""
        for fault in self.faults:
            if fault.name == call.name and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Forwards a request with the same headers, because the client has signed them."""

    proxy: FaultyS3
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def serve(self) -> None:
        """Answer one request."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, parts.path, query, headers)
        self.proxy.calls.append(call)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_for(call)
        if fault is None:
            self._pass_on(body, None)
        elif fault.hangs_up:
            if fault.after:
                self._ask(body)
            self.close_connection = True
        elif (
            fault.without
            or fault.whole
            or fault.begins_at is not None
            or fault.chunked
            or fault.silent_after is not None
        ):
            self._alter(body, fault)
        elif fault.until is not None:
            fault.until.wait()
            self._pass_on(body, None)
        elif fault.cut_at is not None:
            self._pass_on(body, fault.cut_at)
        else:
            if fault.after:
                self._ask(body)
            self._refuse(fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.server.port, timeout=PATIENCE_S)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        found = answer.read()
        connection.close()
        return answer, found

    def _pass_on(self, body: bytes, cut_at: int | None) -> None:
        answer, found = self._ask(body)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found[:cut_at])
        self.close_connection = cut_at is not None

    def _alter(self, body: bytes, fault: Fault) -> None:
        answer, found = self._ask(body)
        replaced = fault.whole or fault.begins_at is not None
        if replaced:
            bucket, _, key = urlsplit(self.path).path.strip("/").partition("/")
            found = self.proxy.server.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        self.send_response(200 if fault.whole else answer.status)
        left_out = {*fault.without, "transfer-encoding", "connection", "date", "server", "content-length"}
        left_out |= {"content-range"} if replaced else set()
        if fault.begins_at is not None:
            self.send_header("Content-Range", f"bytes {fault.begins_at}-{len(found) - 1}/{len(found)}")
            found = found[fault.begins_at :]
        for name, value in answer.getheaders():
            if name.lower() not in left_out:
                self.send_header(name, value)
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            told = None if replaced else answer.getheader("Content-Length")
            self.send_header("Content-Length", told or str(len(found)))
        self.end_headers()
        if self.command == "HEAD":
            return
        begin = found[: fault.cut_at if fault.silent_after is None else fault.silent_after]
        self.wfile.write(b"%x\r\n%s\r\n" % (len(begin), begin) if fault.chunked and begin else begin)
        if fault.silent_after is not None:
            while not fault.woken.wait(0.05 if fault.drips else None):
                self.wfile.write(b"x")
        elif fault.chunked and fault.cut_at is None:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = fault.cut_at is not None

    def _refuse(self, fault: Fault) -> None:
        body = f"<Error><Code>{fault.code}</Code><Message>by request</Message></Error>".encode()
        body = body if fault.body is None else fault.body
        self.send_response(fault.status)
        if fault.retry_after:
            self.send_header("Retry-After", fault.retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def faulty_s3(s3_server: S3Server) -> Iterator[FaultyS3]:
    """Return a proxy before the session's server. It has no faults at first."""
    with FaultyS3(s3_server) as proxy:
        yield proxy
