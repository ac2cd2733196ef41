"""Open TCP and TLS connections that obey the address rule, detect stalls, and end at a cancel.

Functions here raise only OSErrors, such as ``AddressRefused`` and ``Stalled``, and the errors of *check*. The adapters
above know their peer and translate the errors. Standard library only.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ssvm_worker.units import KiB

from .address_policy import AddressRule
from .tls import require_pin

Check = Callable[[], None]
_T = TypeVar("_T")

#: Seconds between two calls of *check* while a socket is idle. A cancel must take effect within 2 s.
TICK = 0.5
#: Reads of at least this size continue while bytes arrive quickly. Smaller reads belong to a header parser.
_FILL_FROM = 64 * KiB
#: The longest time in seconds that one large read continues.
FILL_S = 0.1
#: Seconds between the arrival of data and its read, because every segment wakes the reader. They double within one
#: large read, up to the maximum: a slow peer sends little after the first data.
_NAP_S, _MAX_NAP_S = 0.0001, 0.001
#: The maximum of bytes that ``peek`` returns from a TCP socket.
_PEEKED = 64 * KiB
#: Bytes of TLS records in one read or write of the kernel. More than 512 KiB is no faster.
_RAW = 512 * KiB


class AddressRefused(OSError):
    """The address rule forbids every address of the host."""


class Stalled(TimeoutError):
    """The peer is connected, but it sends or takes no data, or almost none."""


class StallWatch:
    """Timer of the waits for one connection. It raises an error if a wait must end.

    Only waiting counts. So a reader that is delayed by a slow store sees no stall.
    """

    def __init__(self, check: Check = lambda: None, stall_s: float = 60.0, min_rate: float = 1024.0) -> None:
        """Set the limits: a stall is *stall_s* seconds without a byte, or with less than *min_rate* bytes a second."""
        self.check = check
        self.stall_s = stall_s
        self.min_rate = min_rate
        #: Seconds that reads waited for data. A reader that is late does not wait, since its data is there already.
        self.starved = 0.0
        #: The monotonic time after which a wait raises Stalled even if bytes move.
        self.deadline = math.inf
        self._check_at = self._quiet = self._window = 0.0
        self._moved = 0

    def wait(self, move: Callable[[], int]) -> int:
        """Repeat *move*, which times out after a TICK, until it has moved bytes. Return its result (0: the end).

        Raises Stalled. Raises the error of *check* within two ticks, whether bytes move or not.
        """
        while True:
            started = time.monotonic()
            try:
                moved: int | None = move()
            except OSError as error:
                if not _is_timeout(error):
                    raise
                moved = None
            self.spent(time.monotonic() - started, moved or 0)
            if moved is not None:
                return moved

    def look(self) -> None:
        """Call *check* once in a TICK. Raise Stalled after the deadline."""
        now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + TICK
            self.check()
        if now > self.deadline:
            raise Stalled(f"The expected data did not arrive within {self.stall_s:g} s, though bytes moved")

    def spent(self, seconds: float, moved: int = 0) -> None:
        """Record a wait of some seconds that moved so many bytes. Raises Stalled and the error of *check*."""
        self.look()
        self._quiet = 0.0 if moved else self._quiet + seconds
        self._window += seconds
        self._moved += moved
        if self._quiet >= self.stall_s:
            raise Stalled(f"Not a byte moved for {self.stall_s:g} s")
        if self._window >= self.stall_s:
            if self._moved < self.min_rate * self._window:
                raise Stalled(f"Only {self._moved} bytes moved in {self._window:.0f} s")
            self._window, self._moved = 0.0, 0


def _is_timeout(error: OSError) -> bool:
    """Return whether the error only means that no data arrived, or could be sent, within a tick.

    ETIMEDOUT is a TimeoutError as well, but it means a dead connection: the next read would return a clean end.
    A BlockingIOError must never propagate. socket.SocketIO converts it to None, and io.BufferedReader.read1 converts
    None to the end of the stream.
    """
    return isinstance(error, BlockingIOError) or (isinstance(error, TimeoutError) and error.errno is None)


class WatchedSocket(socket.socket):
    """TCP socket with a StallWatch. http.client reads with ``recv_into`` and writes with ``sendall``.

    The creator sets ``watch`` before the first read or write.
    """

    watch: StallWatch
    #: Whether the peer has ended the stream, over TLS with a close_notify. An empty read alone does not prove that.
    ended = False
    _pending_error: OSError | None = None
    _nap_s = _NAP_S

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:  # noqa: ARG002 - callers pass none
        view = memoryview(buffer).cast("B")[: nbytes or None]
        got = self.watch.wait(lambda: self._fill(view))
        self.ended = not got
        return got

    def sendall(self, data: Any, flags: int = 0) -> None:  # noqa: ARG002
        send_all(self._write, data, self.watch)

    def peek(self) -> bytes | None:
        """Return the data that has arrived, and keep it for the next read. Return None if there is none yet."""
        return self.recv(_PEEKED, socket.MSG_PEEK) if self._has_data() else None

    def skip(self, size: int) -> None:
        """Drop some of the data that ``peek`` returned."""
        self.recv(size)

    def _has_data(self) -> bool:
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return bool(poll.poll(0))

    def _read(self, view: memoryview) -> int:
        """Wait up to a tick for data, and read the data that is there."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        if not poll.poll(0):
            started = time.monotonic()
            has_data = poll.poll(1000 * (self.gettimeout() or 0))
            if has_data and len(view) >= _FILL_FROM:
                time.sleep(self._nap_s)
                self._nap_s = min(2 * self._nap_s, _MAX_NAP_S)
            self.watch.starved += time.monotonic() - started
            if not has_data:
                raise TimeoutError
        return super().recv_into(view)

    def _write(self, view: memoryview) -> int:
        """Wait up to a tick for room in the send buffer, and fill it."""
        return super().send(view)

    def _fill(self, view: memoryview) -> int:
        """Read once. Read again while the view is large and more data arrives quickly.

        A TLS record has 16 KiB and a segment far less. Without this loop each of them would be one chunk for Python.
        An error after some bytes is kept for the next call: a reset must not lose the bytes before it.
        """
        if self._pending_error is not None:
            raise self._pending_error
        self._nap_s = _NAP_S
        got = self._read(view)
        until = time.monotonic() + FILL_S
        try:
            while 0 < got < len(view) >= _FILL_FROM and self._pending_error is None and time.monotonic() < until:
                more = self._read(view[got:])
                if not more:
                    break
                got += more
        except OSError as error:
            self._pending_error = None if _is_timeout(error) else error
        return got


class WatchedTLSSocket(WatchedSocket):
    """TLS socket with a StallWatch. TLS works on buffers in memory.

    An ssl.SSLSocket calls the kernel twice for each record of 16 KiB. For 2 GiB that is 266,000 calls and a fifth of
    the wall time. An end without a close_notify raises ssl.SSLEOFError, because an attacker can cause it.
    """

    def __init__(self, plain: WatchedSocket, host: str, context: ssl.SSLContext) -> None:
        """Take over a connected socket. The caller must call ``handshake`` next."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self.watch = plain.watch
        self.settimeout(TICK)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._raw = memoryview(bytearray(_RAW))
        #: Decrypted data that ``peek`` has taken from the connection.
        self._peeked = bytearray()

    def handshake(self) -> None:
        """Do the TLS handshake and verify the peer. Raises ssl.SSLError, Stalled, and the error of *check*."""
        until = time.monotonic() + self.watch.stall_s
        while True:
            try:
                self._do(self._tls.do_handshake)
                return self._flush()
            except TimeoutError:
                self.watch.look()
                if time.monotonic() > until:
                    raise Stalled(f"The TLS handshake took more than {self.watch.stall_s:g} s") from None

    def peer(self) -> bytes:
        """Return the certificate of the peer in DER."""
        return self._tls.getpeercert(binary_form=True) or b""

    def peek(self) -> bytes | None:
        """Return the data that has arrived, and keep it for the next read. Return None if there is none yet.

        Data on the TCP connection can be a session ticket, which does not come from the application of the peer.
        """
        if len(self._peeked) < _PEEKED and self._has_data():
            self._receive()
            try:
                while more := self._tls.read(_PEEKED):
                    self._peeked += more
                return bytes(self._peeked)  # empty: the peer has ended the stream
            except ssl.SSLError as error:
                if not self._peeked and not isinstance(error, ssl.SSLWantReadError):
                    raise
        return bytes(self._peeked) or None

    def skip(self, size: int) -> None:
        """Drop some of the data that ``peek`` returned."""
        del self._peeked[:size]

    def _read(self, view: memoryview) -> int:
        """Wait up to a tick for a record, and read all records that arrived with it. There can be 131,072."""
        if self._peeked:
            size = min(len(view), len(self._peeked))
            view[:size] = self._peeked[:size]
            self.skip(size)
            return size
        read, size = self._tls.read, len(view)
        got: int = self._do(lambda: read(size, view))  # type: ignore[assignment]  # bytes only without a buffer
        try:
            while 0 < got < size and (more := read(size - got, view[got:])):
                got += more  # type: ignore[operator]
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            self._pending_error = error
        return got

    def _write(self, view: memoryview) -> int:
        done = 0
        while done < len(view) and self._outgoing.pending < _RAW:
            done += self._do(lambda: self._tls.write(view[done:]))  # noqa: B023 - called at once
        self._flush()
        return done

    def _do(self, step: Callable[[], _T]) -> _T:
        """Repeat the TLS call *step* until its data has arrived. Raise TimeoutError after a TICK.

        So a peer that sends a record byte by byte cannot prevent the calls of *check*.
        """
        until = time.monotonic() + TICK
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
            if time.monotonic() > until:
                raise TimeoutError
            self._receive()

    def _receive(self) -> None:
        """Wait up to a tick for data of the TCP connection."""
        if got := super()._read(self._raw):
            self._incoming.write(self._raw[:got])
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        if self._outgoing.pending:
            send_all(super()._write, self._outgoing.read(), self.watch)


def send_all(send: Callable[[memoryview], int], data: Any, watch: StallWatch) -> None:
    """Send all of *data* with *send*, which times out after a TICK and returns the number of sent bytes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[watch.wait(lambda: send(view)) :]  # noqa: B023 - called at once


@dataclass(frozen=True)
class ConnectOptions:
    """Options of ``connect``: allowed addresses, the timeout in seconds for all addresses together, and TLS."""

    rule: AddressRule | None = None
    timeout_s: float = 10.0
    tls: ssl.SSLContext | None = None
    #: The IP address to try first if the host has it.
    preferred: str = ""
    #: The thumbprint of the peer's certificate. It is checked before any data is sent.
    pin: str | None = None


def connect(host: str, port: int, options: ConnectOptions, watch: StallWatch) -> WatchedSocket | WatchedTLSSocket:
    """Connect to the first address of *host* that is allowed and answers. With TLS, verify the peer.

    The rule is checked twice: for the addresses of the name, and for the peer of the connected socket. So a name that
    changes its address in between has no effect. If only some addresses of a host are allowed, those are used.
    Raises AddressRefused, socket.gaierror, ssl.SSLError, the error of *check*, and OSError if no address answers.
    """
    found = _resolve(host, port, watch)
    allowed = [(family, address) for family, address in found if not _refusal(address, options.rule)]
    if not allowed:
        first = found[0][1]
        raise AddressRefused(f"{host} has the address {first[0]}, which is {_refusal(first, options.rule)}")
    plain = _connect_any(sorted(allowed, key=lambda each: each[1][0] != options.preferred), options, watch)
    if options.tls is None:
        return plain
    return secure(plain, host, options.tls, options.pin)


def secure(plain: WatchedSocket, host: str, context: ssl.SSLContext, pin: str | None = None) -> WatchedTLSSocket:
    """Start TLS on a connected socket and verify that the peer is *host*. The result owns the socket.

    With a *pin*, raise PinMismatch for another certificate.
    """
    wrapped = None
    try:
        wrapped = WatchedTLSSocket(plain, host, context)
        wrapped.handshake()
        if pin:
            require_pin(wrapped.peer(), pin)
    except BaseException:
        (wrapped or plain).close()
        raise
    return wrapped


def _resolve(host: str, port: int, watch: StallWatch) -> list[tuple[int, Any]]:
    """Look the name up in a thread, because getaddrinfo blocks for minutes if no name server answers.

    Raises socket.gaierror, OSError for an invalid name, TimeoutError after the stall time, and the error of *check*.
    """
    found: list[tuple[int, Any]] = []
    errors: list[BaseException] = []

    def look_up() -> None:
        try:
            found.extend((each[0], each[4]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:  # UnicodeError is a ValueError
            errors.append(error)

    thread = threading.Thread(target=look_up, name="name-lookup", daemon=True)
    thread.start()
    until = time.monotonic() + watch.stall_s
    while thread.is_alive():
        thread.join(TICK)
        watch.look()
        if time.monotonic() > until and thread.is_alive():
            raise TimeoutError(f"No name server answered for {host} within {watch.stall_s:g} s")
    if errors and not isinstance(errors[0], OSError):
        raise OSError(f"Invalid host name {host!r}: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]
    return found


def _refusal(address: Any, rule: AddressRule | None) -> str | None:
    return rule.refuse(address[0]) if rule else None


def _connect_any(addresses: list[tuple[int, Any]], options: ConnectOptions, watch: StallWatch) -> WatchedSocket:
    until = time.monotonic() + options.timeout_s
    for left, (family, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        # Each address gets an equal share of the remaining time, so a dead one leaves time for the next.
        share = max(0.0, until - time.monotonic()) / left
        sock = WatchedSocket(family, socket.SOCK_STREAM)
        sock.watch = watch
        try:
            _connect_one(sock, address, share)
            if reason := _refusal(sock.getpeername(), options.rule):
                raise AddressRefused(f"The socket is connected to {sock.getpeername()[0]}, which is {reason}")
            sock.settimeout(TICK)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError:
            sock.close()
            if left == 1:
                raise
        except BaseException:
            sock.close()
            raise
    raise AssertionError("unreachable: getaddrinfo returns at least one address")


def _connect_one(sock: WatchedSocket, address: Any, timeout_s: float) -> None:
    """Connect, and call *check* after each tick."""
    until = time.monotonic() + timeout_s
    sock.setblocking(False)
    if (error := sock.connect_ex(address)) not in (0, errno.EINPROGRESS):
        raise OSError(error, _failed(address, error))
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while not poll.poll(min(TICK, timeout_s) * 1000):
        sock.watch.check()
        if time.monotonic() > until:
            raise TimeoutError(f"{address[0]} port {address[1]} did not answer within {timeout_s:.3g} s")
    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, _failed(address, error))


def _failed(address: Any, error: int) -> str:
    return f"{address[0]} port {address[1]}: {os.strerror(error)}"
