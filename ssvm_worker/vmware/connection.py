"""The logged-in connection to a vCenter or ESXi host: properties are read, and waited for, through it."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pyVim import connect as pyvim
from pyVmomi import vim, vmodl

from ssvm_worker.errors import Cancelled, SourceDenied, SourceUnavailable, WorkerError
from ssvm_worker.net.sockets import ConnectOptions, StallWatch, WatchedTLSSocket, connect
from ssvm_worker.streaming.interfaces import Check

from .address import Address
from .faults import API_ERRORS, meaning, translated
from .trust import PinMismatch, api_context, context_for, reason, refuse_other, thumbprint

#: Seconds to connect, as against waiting for an answer.
_CONNECT_S = 10.0
#: Seconds of one long poll at the most; below every time-out that a proxy between us and vCenter may have.
_POLL_S = 20
#: Seconds that a cancelled task gets to end; many kinds cannot be cancelled at all.
_CALL_OFF_S = 60.0


class Connection:
    """A login, opened after a fork. Threads may share it; *check* is heard in each, but within a shield."""

    def __init__(self, address: Address, check: Check = lambda: None) -> None:
        self.address = address
        self._check = check
        self._shield = threading.local()
        self._reviving = threading.Lock()
        self._instance: Any = None

    def open(self) -> None:
        """Log in. The certificate is judged before anything is sent.

        Raises SourceDenied (certificate, password), SourceUnavailable.
        """
        address = self.address
        probe(address, self.check)
        with translated("Logging in", address.name):
            try:
                self._instance = pyvim.SmartConnect(
                    host=address.host,
                    port=address.port,
                    user=address.username,
                    pwd=address.password,
                    sslContext=api_context(address.ca_file, address.pin, self.check, address.timeout_s),
                    httpConnectionTimeout=_CONNECT_S,
                )
            except (WorkerError, *API_ERRORS):
                raise
            except Exception as error:
                # pyVim raises a bare Exception where there is no vSphere behind the port.
                raise SourceUnavailable(
                    f"No vSphere answers: {error}", address.name, "Look at host and port"
                ) from error

    def close(self) -> None:
        """Log out; an error is of no interest, sessions expire by themselves."""
        if self._instance is not None:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                pyvim.Disconnect(self._instance)
            self._instance = None

    def check(self) -> None:
        """Raise Cancelled if the job must stop, unless this thread is in a shield."""
        if not getattr(self._shield, "depth", 0):
            self._check()

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Calls of this thread within are made even though the job was cancelled: they clean up."""
        self._shield.depth = getattr(self._shield, "depth", 0) + 1
        try:
            yield
        finally:
            self._shield.depth -= 1

    def revive(self) -> None:
        """Log in again if the session has ended: by its idle time, or because vCenter was restarted.

        A lease belongs to the session that opened it; whoever has one finds it gone. Raises as ``open`` does.
        """
        with self._reviving, translated("Logging in again", self.address.name):
            manager = self.content.sessionManager
            with contextlib.suppress(vim.fault.NotAuthenticated):
                if self.read(manager, "currentSession")["currentSession"] is not None:
                    return
            manager.Login(self.address.username, self.address.password)

    @property
    def content(self) -> Any:
        """vSphere's ServiceContent."""
        return self._instance.content

    @property
    def cookie(self) -> str:
        """The session's cookie as a request header's value; for a host that wants it, never for a log."""
        return str(self._instance._stub.cookie).partition(";")[0]

    def object(self, kind: type, moref: str) -> Any:
        """A managed object by its id; nothing is asked of the server."""
        return kind(moref, self._instance._stub)

    def read(self, thing: Any, *paths: str) -> dict[str, Any]:
        """Some properties of one object, None for what is unset; ManagedObjectNotFound and others as they come.

        Only by the property collector: pyVmomi fails on attributes that hold an unset or unknown enumeration.
        """
        select = vmodl.query.PropertyCollector.PropertySpec(type=type(thing), pathSet=list(paths))
        spec = vmodl.query.PropertyCollector.FilterSpec(objectSet=[_only(thing)], propSet=[select])
        options = vmodl.query.PropertyCollector.RetrieveOptions()
        found = self.content.propertyCollector.RetrievePropertiesEx([spec], options)
        values: dict[str, Any] = dict.fromkeys(paths)
        for each in found.objects if found else []:
            values |= {pair.name: pair.val for pair in each.propSet}
        return values

    def each(self, kind: type, *paths: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Every object of a kind in the inventory, with some of its properties, as ``read`` gives them."""
        view = self.content.viewManager.CreateContainerView(self.content.rootFolder, [kind], True)
        collector = vmodl.query.PropertyCollector
        through = collector.TraversalSpec(type=type(view), path="view", skip=False)
        spec = collector.FilterSpec(
            objectSet=[collector.ObjectSpec(obj=view, skip=True, selectSet=[through])],
            propSet=[collector.PropertySpec(type=kind, pathSet=list(paths))],
        )
        try:
            found = self.content.propertyCollector.RetrievePropertiesEx([spec], collector.RetrieveOptions())
            while found:
                for it in found.objects:
                    yield it.obj, dict.fromkeys(paths) | {pair.name: pair.val for pair in it.propSet}
                token = found.token
                found = self.content.propertyCollector.ContinueRetrievePropertiesEx(token) if token else None
        finally:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                view.DestroyView()

    def wait(self, thing: Any, paths: tuple[str, ...], done: Callable[[dict[str, Any]], bool], limit_s: float) -> Any:
        """The properties as soon as *done* says so of them; None when *limit_s* has passed."""
        deadline = time.monotonic() + limit_s
        collector = self.content.propertyCollector.CreatePropertyCollector()
        try:
            select = vmodl.query.PropertyCollector.PropertySpec(type=type(thing), pathSet=list(paths))
            spec = vmodl.query.PropertyCollector.FilterSpec(objectSet=[_only(thing)], propSet=[select])
            collector.CreateFilter(spec, partialUpdates=False)
            poll_s = max(1, min(_POLL_S, int(self.address.timeout_s / 2)))
            return _collect(collector, dict.fromkeys(paths), done, (deadline, poll_s))
        finally:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                collector.DestroyPropertyCollector()

    def finish(self, task: Any, limit_s: float) -> Any:
        """The result of a task; its fault is raised, and SourceUnavailable when it takes longer than *limit_s*."""
        try:
            ended = self._end_of(task, limit_s)
        except Cancelled:
            self._call_off(task)
            raise
        if ended is None:
            what = f"A task has not ended within {limit_s:.0f} s"
            raise SourceUnavailable(what, self.address.name, "Look at the VM's recent tasks")
        if ended["info.state"] == "error":
            raise self.read(task, "info.error")["info.error"]
        return self.read(task, "info.result")["info.result"]

    def _end_of(self, task: Any, limit_s: float) -> Any:
        return self.wait(task, ("info.state",), lambda seen: seen["info.state"] in ("success", "error"), limit_s)

    def _call_off(self, task: Any) -> None:
        """Cancel a task and see it end, so that whoever cleans up finds all that it made."""
        with contextlib.suppress(*API_ERRORS), self.shielded():
            with contextlib.suppress(vmodl.MethodFault):
                task.CancelTask()
            self._end_of(task, _CALL_OFF_S)


def _only(thing: Any) -> Any:
    return vmodl.query.PropertyCollector.ObjectSpec(obj=thing)


def _collect(
    collector: Any, seen: dict[str, Any], done: Callable[[dict[str, Any]], bool], patience: tuple[float, int]
) -> Any:
    """*patience*: when to stop altogether, and the seconds of one long poll."""
    (deadline, poll_s), version = patience, ""
    while (left := deadline - time.monotonic()) > 0:
        options = vmodl.query.PropertyCollector.WaitOptions(maxWaitSeconds=max(1, min(poll_s, int(left))))
        update = collector.WaitForUpdatesEx(version, options)
        if update is None:
            continue
        version = update.version
        for change in (change for each in update.filterSet for of in each.objectSet for change in of.changeSet):
            seen[change.name] = change.val if change.op in ("assign", "add") else None
        if done(seen):
            return seen
    return None


def probe(address: Address, check: Check) -> None:
    """Connect and look at the certificate, so that what is wrong is said plainly and no password is sent in vain.

    Raises SourceDenied naming the thumbprint that the server shows; SourceUnavailable.
    """
    dial = ConnectOptions(timeout_s=_CONNECT_S, tls=context_for(address.ca_file, address.pin))
    watch = StallWatch(check, address.timeout_s)
    try:
        with contextlib.closing(connect(address.host, address.port, dial, watch)) as sock:
            if address.pin:
                assert isinstance(sock, WatchedTLSSocket)
                refuse_other(sock.peer(), address.pin)
    except (ssl.SSLCertVerificationError, PinMismatch) as error:
        raise _untrusted(error, address, check) from error
    except OSError as error:
        raise meaning(error, "Connecting", address.name) from error


def _untrusted(error: ssl.SSLError, address: Address, check: Check) -> SourceDenied:
    """Connects once more, believing anything and sending nothing, to tell what the server shows."""
    shown = "unknown"
    dial = ConnectOptions(timeout_s=_CONNECT_S, tls=context_for(None, "any"))
    watch = StallWatch(check, address.timeout_s)
    with contextlib.suppress(OSError), contextlib.closing(connect(address.host, address.port, dial, watch)) as sock:
        assert isinstance(sock, WatchedTLSSocket)
        shown = thumbprint(sock.peer())
    return SourceDenied(
        f"The certificate is not trusted: {reason(error)}. It is the one with SHA-256 thumbprint {shown}",
        address.name,
        "If that is your server's, set thumbprint, or name its authority's certificate in ca_file",
    )
