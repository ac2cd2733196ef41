"""The logged-in connection to a vCenter or ESXi host. It reads properties and waits until they change."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any

from pyVim import connect as pyvim
from pyVmomi import vim, vmodl

from ssvm_worker.errors import Cancelled, SourceDenied, SourceUnavailable, WorkerError
from ssvm_worker.net.sockets import ConnectOptions, StallWatch, WatchedTLSSocket, connect
from ssvm_worker.net.tls import PinMismatch, context_for, thumbprint
from ssvm_worker.streaming.interfaces import Check

from .faults import API_ERRORS, as_worker_error, translated
from .trust import Address, api_context, failure_reason

#: Seconds to connect. The time-out of an answer is ``Address.timeout_s``.
_CONNECT_S = 10.0
#: Maximum seconds of one long poll. It must be below the time-out of any proxy between the worker and vCenter.
_POLL_S = 20
#: Seconds to wait for the end of a cancelled task. Many kinds of tasks cannot be cancelled.
_CANCEL_TASK_S = 60.0

_COLLECTOR = vmodl.query.PropertyCollector


class Connection:
    """A login to a server. Open it after a fork. Threads may share it.

    *check* may cancel the calls of any thread, except inside ``shielded``.
    """

    def __init__(self, address: Address, check: Check = lambda: None) -> None:
        self.address = address
        self._check = check
        self._shield = threading.local()
        self._login_lock = threading.Lock()
        self._instance: Any = None
        self._content: Any = None

    def open(self) -> None:
        """Log in, after a check of the server's certificate.

        Raises SourceDenied (certificate, password) and SourceUnavailable.
        """
        address = self.address
        check_certificate(address, self.check)
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
                _name_unreadable_answers(self._instance._stub)
                # Each access to the attribute is a call, and the answer never changes.
                self._content = self._instance.content
            except (WorkerError, *API_ERRORS):
                raise
            except Exception as error:
                # pyVim raises a bare Exception if the server on this port is not vSphere.
                raise SourceUnavailable(f"No vSphere answers: {error}", address.name, "Check host and port") from error

    def close(self) -> None:
        """Log out. Errors are ignored: the server expires unused sessions."""
        if self._instance is not None:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                pyvim.Disconnect(self._instance)
            self._instance = None

    def check(self) -> None:
        """Raise Cancelled if the job must stop, unless this thread is inside ``shielded``."""
        if not getattr(self._shield, "depth", 0):
            self._check()

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Ignore cancellation in this thread while the block runs, so that the block can clean up."""
        self._shield.depth = getattr(self._shield, "depth", 0) + 1
        try:
            yield
        finally:
            self._shield.depth -= 1

    def revive(self) -> None:
        """Log in again if the session has ended, because it was idle or vCenter restarted.

        A lease ends with the session that opened it. Raises the same errors as ``open``.
        """
        with self._login_lock, translated("Logging in again", self.address.name):
            manager = self.content.sessionManager
            with contextlib.suppress(vim.fault.NotAuthenticated):
                if self.read(manager, "currentSession")["currentSession"] is not None:
                    return
            manager.Login(self.address.username, self.address.password)

    @property
    def content(self) -> Any:
        """Return vSphere's ServiceContent."""
        return self._content

    @property
    def cookie(self) -> str:
        """Return the session's cookie as the value of a request header. Never log it."""
        return str(self._instance._stub.cookie).partition(";")[0]

    def object(self, kind: type, moref: str) -> Any:
        """Return a managed object by its id, without a request to the server."""
        return kind(moref, self._instance._stub)

    def read(self, entity: Any, *paths: str) -> dict[str, Any]:
        """Return some properties of one managed object; an unset property is None.

        It uses the property collector, because pyVmomi's own attributes fail on unset or unknown enumeration values.
        A property that the user may not read is None too.
        Raises ManagedObjectNotFound, NotAuthenticated and the other faults of the API untranslated.
        """
        options = _COLLECTOR.RetrieveOptions()
        found = self.content.propertyCollector.RetrievePropertiesEx([_filter(entity, paths)], options)
        values: dict[str, Any] = dict.fromkeys(paths)
        for each in found.objects if found else []:
            for missing in each.missingSet or ():
                # After the end of the session, the call itself succeeds, and each property is missing.
                if isinstance(missing.fault, vim.fault.NotAuthenticated):
                    raise missing.fault
            values |= {pair.name: pair.val for pair in each.propSet}
        return values

    def each(self, kind: type, *paths: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield every object of a kind in the inventory with some of its properties, in the form of ``read``."""
        view = self.content.viewManager.CreateContainerView(self.content.rootFolder, [kind], True)
        members = _COLLECTOR.TraversalSpec(type=type(view), path="view", skip=False)
        spec = _COLLECTOR.FilterSpec(
            objectSet=[_COLLECTOR.ObjectSpec(obj=view, skip=True, selectSet=[members])],
            propSet=[_COLLECTOR.PropertySpec(type=kind, pathSet=list(paths))],
        )
        try:
            found = self.content.propertyCollector.RetrievePropertiesEx([spec], _COLLECTOR.RetrieveOptions())
            while found:
                for each in found.objects:
                    yield each.obj, dict.fromkeys(paths) | {pair.name: pair.val for pair in each.propSet}
                token = found.token
                found = self.content.propertyCollector.ContinueRetrievePropertiesEx(token) if token else None
        finally:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                view.DestroyView()

    def wait(self, entity: Any, paths: tuple[str, ...], done: Callable[[dict[str, Any]], bool], limit_s: float) -> Any:
        """Return the properties as soon as *done* accepts them, or None after *limit_s*."""
        deadline = time.monotonic() + limit_s
        collector = self.content.propertyCollector.CreatePropertyCollector()
        try:
            collector.CreateFilter(_filter(entity, paths), partialUpdates=False)
            poll_s = max(1, min(_POLL_S, int(self.address.timeout_s / 2)))
            values: dict[str, Any] = dict.fromkeys(paths)
            version = ""
            while (left := deadline - time.monotonic()) > 0:
                options = _COLLECTOR.WaitOptions(maxWaitSeconds=max(1, min(poll_s, int(left))))
                update = collector.WaitForUpdatesEx(version, options)
                if update is None:
                    continue
                version = update.version
                changes = (
                    each for filter_ in update.filterSet for object_ in filter_.objectSet for each in object_.changeSet
                )
                # A removed property is None.
                values |= {each.name: each.val if each.op in ("assign", "add") else None for each in changes}
                if done(values):
                    return values
            return None
        finally:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                collector.DestroyPropertyCollector()

    def finish(self, task: Any, limit_s: float) -> Any:
        """Wait for a task and return its result.

        Raises the task's fault, and SourceUnavailable if the task takes longer than *limit_s*.
        If the job is cancelled, this method cancels the task and waits for its end.
        The clean-up then finds everything that the task has created.
        """

        def wait(seconds: float) -> Any:
            states = ("success", "error")
            return self.wait(task, ("info.state",), lambda values: values["info.state"] in states, seconds)

        try:
            ended = wait(limit_s)
        except Cancelled:
            with contextlib.suppress(*API_ERRORS), self.shielded():
                with contextlib.suppress(vmodl.MethodFault):
                    task.CancelTask()
                wait(_CANCEL_TASK_S)
            raise
        if ended is None:
            what = f"A task has not ended within {limit_s:.0f} s"
            raise SourceUnavailable(what, self.address.name, "Check the VM's recent tasks")
        if ended["info.state"] == "error":
            raise self.read(task, "info.error")["info.error"]
        return self.read(task, "info.result")["info.result"]


def _name_unreadable_answers(stub: Any) -> None:
    """Make the stub raise HTTPException for an answer that pyVmomi cannot read.

    A newer vSphere may send types that pyVmomi does not know. pyVmomi then raises KeyError or a similar error.
    """
    invoke = stub.InvokeMethod

    def invoke_method(*args: Any) -> Any:
        try:
            return invoke(*args)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, OSError):
                raise
            raise HTTPException(f"the answer has a type or value that pyVmomi does not know: {error!r}") from error

    stub.InvokeMethod = invoke_method


def _filter(entity: Any, paths: tuple[str, ...]) -> Any:
    """Return the filter for some properties of one object."""
    return _COLLECTOR.FilterSpec(
        objectSet=[_COLLECTOR.ObjectSpec(obj=entity)],
        propSet=[_COLLECTOR.PropertySpec(type=type(entity), pathSet=list(paths))],
    )


def check_certificate(address: Address, check: Check) -> None:
    """Connect and check the server's certificate, so that a wrong server gets no password and the error is clear.

    Raises SourceDenied with the thumbprint of the server's certificate, and SourceUnavailable.
    """

    def dial(context: ssl.SSLContext, pin: str | None = None) -> WatchedTLSSocket:
        options = ConnectOptions(timeout_s=_CONNECT_S, tls=context, pin=pin)
        watch = StallWatch(check, address.timeout_s)
        sock = connect(address.host, address.port, options, watch)
        assert isinstance(sock, WatchedTLSSocket)
        return sock

    try:
        dial(context_for(address.ca_file, address.pin), address.pin).close()
    except (ssl.SSLCertVerificationError, PinMismatch) as error:
        shown = "unknown"
        # Connect again without verification, and send nothing: only to read the certificate for the message.
        with contextlib.suppress(OSError), contextlib.closing(dial(context_for(None, "any"))) as sock:
            shown = thumbprint(sock.peer())
        raise SourceDenied(
            f"The certificate is not trusted: {failure_reason(error)}. Its SHA-256 thumbprint is {shown}",
            address.name,
            "If that is your server, set thumbprint, or set ca_file to the certificate of its authority",
        ) from error
    except OSError as error:
        raise as_worker_error(error, "Connecting", address.name) from error
