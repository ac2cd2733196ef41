"""TCP and TLS connections that go only where they may, notice a stall, and hear a cancel.

Raises OSErrors only (``AddressRefused`` and ``Stalled`` are two) and what *check* raises; the adapters above know what
they were talking to, and translate. Standard library only.
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

from ssvm_worker.errors import ConfigError
from ssvm_worker.units import KiB

from .address_policy import AddressRule

Check = Callable[[], None]
_T = TypeVar("_T")

#: Seconds between two looks at the stop flag while a socket is quiet: a cancel must arrive within 2 s.
TICK = 0.5
#: Reads of this size and above are filled as far as bytes come quickly; smaller ones are those of a header parser.
_FILL_FROM = 64 * KiB
#: Seconds that one large read may go on filling.
_FILL_S = 0.1
#: Seconds after which what has begun to come is read: a peer wakes its reader for every segment. Within one large read
#: they double, up to the longest: a slow peer has little to give after the first.
_NAP_S, _LONGEST_NAP_S = 0.0005, 0.008
#: Bytes of TLS records that are asked of the kernel, or given to it, at once; from 512 KiB on more gains nothing.
_RAW = 512 * KiB


class AddressRefused(OSError):
    """Our own rule forbids every address of that host."""


class Stalled(TimeoutError):
    """The peer is connected, but nothing, or next to nothing, comes or is taken."""


class StallWatch:
    """Accounts for the time spent waiting on one connection, and ends the wait when it must end.

    Only waiting counts: a reader that is itself held up by a slow store sees no stall.
    """

    def __init__(self, check: Check = lambda: None, stall_s: float = 60.0, min_rate: float = 1024.0) -> None:
        """*stall_s*: seconds without a byte, or below *min_rate* bytes a second, that are a stall."""
        self.check = check
        self.stall_s = stall_s
        self.min_rate = min_rate
        #: Seconds in which a read found nothing and waited: a reader that is itself late finds its bytes there.
        self.starved = 0.0
        #: By the monotonic clock: when a wait ends with Stalled though bytes move.
        self.deadline = math.inf
        self._check_at = self._quiet = self._window = 0.0
        self._moved = 0

    def wait(self, move: Callable[[], int]) -> int:
        """Repeat *move*, which times out after a TICK, until it has moved bytes; returns its result (0: the end).

        Raises Stalled, and within two ticks what *check* raises, whether bytes move or not.
        """
        while True:
            started = time.monotonic()
            moved = _moved(move)
            self.spent(time.monotonic() - started, moved or 0)
            if moved is not None:
                return moved

    def look(self) -> None:
        """Call *check* once in a TICK; Stalled after the deadline."""
        now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + TICK
            self.check()
        if now > self.deadline:
            raise Stalled(f"What was waited for did not come within {self.stall_s:g} s, though bytes moved")

    def spent(self, seconds: float, moved: int = 0) -> None:
        """Account for a wait that moved so many bytes; raises Stalled, and what *check* raises."""
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


def _moved(move: Callable[[], int]) -> int | None:
    try:
        return move()
    except OSError as error:
        if _is_quiet(error):
            return None
        raise


def _is_quiet(error: OSError) -> bool:
    """Whether nothing came, or had room, within a tick.

    ETIMEDOUT is a TimeoutError as well, but of a connection that is dead: the read after it would find a clean end. A
    BlockingIOError is never let through: socket.SocketIO makes None of it, and io.BufferedReader.read1 an end of that.
    """
    return isinstance(error, BlockingIOError) or (isinstance(error, TimeoutError) and error.errno is None)


class WatchedSocket(socket.socket):
    """A TCP socket under a watch; http.client reads by ``recv_into`` and writes by ``sendall``.

    ``watch`` is set before the first byte.
    """

    watch: StallWatch
    #: Whether the peer has ended the stream, over TLS by a close_notify; a reader's b"" alone may mean less.
    ended = False
    _late: OSError | None = None
    _nap_s = _NAP_S

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:  # noqa: ARG002 - nobody gives any
        view = memoryview(buffer).cast("B")[: nbytes or None]
        got = self.watch.wait(lambda: self._fill(view))
        self.ended = not got
        return got

    def sendall(self, data: Any, flags: int = 0) -> None:  # noqa: ARG002
        send_all(self._write, data, self.watch)

    def _read(self, view: memoryview) -> int:
        """Wait a tick for bytes and read what there is."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        if not poll.poll(0):
            started = time.monotonic()
            has_come = poll.poll(1000 * (self.gettimeout() or 0))
            if has_come and len(view) >= _FILL_FROM:
                time.sleep(self._nap_s)
                self._nap_s = min(2 * self._nap_s, _LONGEST_NAP_S)
            self.watch.starved += time.monotonic() - started
            if not has_come:
                raise TimeoutError
        return super().recv_into(view)

    def _write(self, view: memoryview) -> int:
        """Wait a tick for room and send what has room."""
        return super().send(view)

    def _fill(self, view: memoryview) -> int:
        """Read once, and on while the view is large and more comes at once.

        A TLS record has 16 KiB and a segment far less; without this each of them is a chunk of its own for Python. An
        error after some bytes is kept for the next call: a reset must not cost the bytes that came before it.
        """
        if self._late is not None:
            raise self._late
        self._nap_s = _NAP_S
        got = self._read(view)
        until = time.monotonic() + _FILL_S
        try:
            while 0 < got < len(view) >= _FILL_FROM and self._late is None and time.monotonic() < until:
                more = self._read(view[got:])
                if not more:
                    break
                got += more
        except OSError as error:
            self._late = None if _is_quiet(error) else error
        return got


class WatchedTLSSocket(WatchedSocket):
    """The same over TLS, which is done in memory.

    An ssl.SSLSocket asks the kernel twice for each record of 16 KiB: 266,000 times for 2 GiB, a fifth of the wall time.
    An end without a close_notify is an ssl.SSLEOFError: it may have been made by anybody.
    """

    def __init__(self, plain: WatchedSocket, host: str, context: ssl.SSLContext) -> None:
        """Take over a connected socket; the handshake is yet to come."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self.watch = plain.watch
        self.settimeout(TICK)
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._goes, server_hostname=host)
        self._raw = memoryview(bytearray(_RAW))

    def handshake(self) -> None:
        """Agree with the peer, which is who it should be; ssl.SSLError, Stalled, what the watch's check raises."""
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
        """The peer's certificate, in DER."""
        return self._tls.getpeercert(binary_form=True) or b""

    def _read(self, view: memoryview) -> int:
        """Wait a tick for a record, and take those that came with it; there may be 131,072 of them."""
        got = self._do(lambda: self._record(view))
        try:
            while 0 < got < len(view) and (more := self._record(view[got:])):
                got += more
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            self._late = error
        return got

    def _record(self, view: memoryview) -> int:
        return self._tls.read(len(view), view)  # type: ignore[return-value]  # bytes, where there is no buffer

    def _write(self, view: memoryview) -> int:
        done = 0
        while done < len(view) and self._goes.pending < _RAW:
            done += self._do(lambda: self._tls.write(view[done:]))  # noqa: B023 - called at once
        self._flush()
        return done

    def _do(self, step: Callable[[], _T]) -> _T:
        """Repeat *step* of TLS until the bytes that it needs have come; TimeoutError after a TICK.

        A peer that sends a record byte by byte must not keep the watch from looking.
        """
        until = time.monotonic() + TICK
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
            if time.monotonic() > until:
                raise TimeoutError
            if got := super()._read(self._raw):
                self._came.write(self._raw[:got])
            else:
                self._came.write_eof()

    def _flush(self) -> None:
        if self._goes.pending:
            send_all(super()._write, self._goes.read(), self.watch)


def send_all(send: Callable[[memoryview], int], data: Any, watch: StallWatch) -> None:
    """Send all of *data* by *send*, which times out after a TICK and tells how much it took."""
    view = memoryview(data).cast("B")
    while view:
        view = view[watch.wait(lambda: send(view)) :]  # noqa: B023 - called at once


def tls_context(*ca_files: str | None, certificate: str | None = None) -> ssl.SSLContext:
    """A verifying client context: TLS 1.2 at least, the system's authorities and those of the files.

    *certificate*: our own, with its key, in one PEM file. Raises ConfigError for a file that cannot be read as PEM.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for ca_file in filter(None, ca_files):
        try:
            context.load_verify_locations(ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"No certificates can be read: {error}", ca_file, "Give a PEM file as ca_file") from error
    try:
        if certificate:
            context.load_cert_chain(certificate)
    except OSError as error:
        what = f"No certificate and key can be read: {error}"
        raise ConfigError(what, certificate or "", "Give both in one PEM file as certificate_file") from error
    return context


@dataclass(frozen=True)
class ConnectOptions:
    """How to connect: which addresses, how long (seconds for all of them together), and TLS or not."""

    rule: AddressRule | None = None
    timeout_s: float = 10.0
    tls: ssl.SSLContext | None = None
    #: The IP address to try first, if the host has it.
    first: str = ""


def connect(host: str, port: int, dial: ConnectOptions, watch: StallWatch) -> WatchedSocket | WatchedTLSSocket:
    """A connected (and, with TLS, verified) socket to the first address of *host* that is allowed and answers.

    The rule is applied to what the name resolves to, and again to the peer of the connected socket, so a name that
    changes its mind in between gains nothing. A host with both kinds of addresses is reached on the allowed ones.
    Raises AddressRefused; socket.gaierror; other OSErrors when nobody answers; ssl.SSLError; what *check* raises.
    """
    places = _allowed(host, _resolve(host, port, watch), dial.rule)
    plain = _connect_any(sorted(places, key=lambda place: place[1][0] != dial.first), dial, watch)
    if dial.tls is None:
        return plain
    return secure(plain, host, dial.tls)


def secure(plain: WatchedSocket, host: str, context: ssl.SSLContext) -> WatchedTLSSocket:
    """TLS on a connected socket, which it owns from now on, with the peer verified to be *host*."""
    wrapped = None
    try:
        wrapped = WatchedTLSSocket(plain, host, context)
        wrapped.handshake()
    except BaseException:
        (wrapped or plain).close()
        raise
    return wrapped


def _resolve(host: str, port: int, watch: StallWatch) -> list[tuple[int, Any]]:
    """Look the name up in a thread: getaddrinfo blocks for minutes when no name server answers.

    Raises socket.gaierror, OSError for what is no host name, TimeoutError after the stall time, what *check* raises.
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
        raise OSError(f"{host!r} is no host name: {errors[0]}") from errors[0]
    if errors:
        raise errors[0]
    return found


def _allowed(host: str, found: list[tuple[int, Any]], rule: AddressRule | None) -> list[tuple[int, Any]]:
    """Family and address of each place where *host* may be reached; AddressRefused if there is none."""
    allowed = [(family, address) for family, address in found if not _refusal(address, rule)]
    if not allowed:
        first = found[0][1]
        raise AddressRefused(f"{host} is at {first[0]}, which is {_refusal(first, rule)}")
    return allowed


def _refusal(address: Any, rule: AddressRule | None) -> str | None:
    return rule.refuse(address[0]) if rule else None


def _connect_any(places: list[tuple[int, Any]], dial: ConnectOptions, watch: StallWatch) -> WatchedSocket:
    until = time.monotonic() + dial.timeout_s
    for left, (family, address) in zip(range(len(places), 0, -1), places, strict=True):
        # Each address gets its share of what is left, so that a first one that is dead leaves time for the second.
        share = max(0.0, until - time.monotonic()) / left
        sock = WatchedSocket(family, socket.SOCK_STREAM)
        sock.watch = watch
        try:
            _connect_one(sock, address, share)
            if reason := _refusal(sock.getpeername(), dial.rule):
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
    raise AssertionError("unreachable: getaddrinfo gives one address at least")


def _connect_one(sock: WatchedSocket, address: Any, timeout_s: float) -> None:
    """Connect without blocking for longer than a tick at a time."""
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
