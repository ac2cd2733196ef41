"""Client for a management server in Python: submit, follow, retry and cancel jobs, and read job events.

    with Client.connect("redis://broker:6379/0", zone="zone1") as client:
        job = client.submit("download", url="https://…/noble.qcow2", account="2", id="201", checksum="sha256:…")
        print(client.wait(job.job_id).result)

It needs only the broker: no store, no vCenter and no settings file. For other languages see docs/reference/jobs.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from .config.schema import BrokerSection, Settings
from .jobs import find_job
from .ledger.events import Event
from .ledger.record import Beside, NewJob, Record
from .ledger.workers import WorkerStatus
from .operations.traces import traceparent as checked
from .wiring import assembly

__all__ = ["Client", "Event", "Record", "WorkerStatus"]


class Client:
    """Client of the workers behind one broker. Thread-safe.

    Every method raises StoreUnavailable while the broker is unreachable. It may be repeated then.
    """

    def __init__(
        self, settings: Settings, wake: Callable[[Record], object] | None = None, *, of_server: bool = False
    ) -> None:
        """Store the settings.

        *wake* sends the message of a queued job, or arranges that another thread does. Default: ``send_wakeup``.
        *of_server* is for the agent of a management server: its jobs have ids that no other sender can use.
        """
        self.settings = settings
        self._ledger = assembly.open_ledger(settings)
        self._wake = wake or self.send_wakeup
        self._of_server = of_server

    @classmethod
    def connect(cls, url: str, *, zone: str = "zone1", **broker: Any) -> Client:
        """Return a client of the broker at *url*. This does not connect yet.

        *broker* takes prefix, messages and ca_file, with the same values as in the settings of the workers.
        """
        return cls(Settings(zone=zone, broker=BrokerSection.model_validate({"url": url, **broker})))

    def submit(self, job: str, *, zone: str = "", job_id: str = "", traceparent: str = "", **request: Any) -> Record:
        """Queue a job with these fields of its request. *traceparent* adds the job to a trace.

        With a *job_id* the call may be repeated: the same request is the same job. Raises InvalidRequest if the request
        is invalid, or if another request has the same id.
        """
        fields = request | ({"job_id": job_id} if job_id else {})
        new = self.new_job(job, fields, zone)
        record, is_new = self._ledger.submit(replace(new, traceparent=checked(traceparent)))
        if is_new:
            self._wake(record)
        return record

    def submit_or_find(self, jobs: Sequence[tuple[NewJob, Beside | None]]) -> list[tuple[Record, bool]]:
        """Queue jobs with one request to the broker, and store a value beside each. Return the records.

        If an id is known, return that job, even if its request differs. Then its value is not stored, and its record
        comes with False. After an error some jobs may be queued. The reaper of a worker then sends their messages.
        """
        found = self._ledger.submit_or_find(jobs)
        for record, is_new in found:
            if is_new:
                self._wake(record)
        return found

    def new_job(self, job: str, fields: dict[str, Any], zone: str = "") -> NewJob:
        """Return a job with these fields, which is not submitted yet. Raise InvalidRequest."""
        return assembly.new_job(self.settings, find_job(job), fields, zone=zone, of_server=self._of_server)

    def job(self, job_id: str) -> Record:
        """Return the current record of a job, or raise ObjectNotFound."""
        return self._ledger.get(job_id)

    def jobs(self, *, state: str | None = None, zone: str | None = None, limit: int = 50) -> list[Record]:
        """Return jobs, the newest first."""
        return self._ledger.page(state=state, zone=zone, limit=limit)

    def follow(self, job_id: str, *, every_s: float = 0.5) -> Iterator[Record]:
        """Yield the record now and after each change. The last record is that of the ended job."""
        seen = None
        while True:
            record = self._ledger.get(job_id)
            if record != seen:
                yield record
            if record.ended:
                return
            seen = record
            time.sleep(every_s)

    def wait(self, job_id: str, *, timeout_s: float | None = None) -> Record:
        """Wait for the end of a job and return its record.

        Raises TimeoutError after *timeout_s* seconds. The job continues then.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not (record := self._ledger.get(job_id)).ended:
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"job {job_id} is {record.state} after {timeout_s:g} s")
            time.sleep(0.2)
        return record

    def retry(self, job_id: str, *, by: str) -> Record:
        """Queue a failed or cancelled job again. Raise InvalidRequest or ResourceBusy for any other job."""
        record = self._ledger.retry(job_id, by)
        self._wake(record)
        return record

    def cancel(self, job_id: str, *, by: str) -> Record:
        """Cancel a queued job, or ask the worker of a running one to stop and clean up."""
        return self._ledger.cancel(job_id, by)

    def events(self, group: str, consumer: str) -> Iterator[Event]:
        """Yield changes of job states for this consumer of the group, each at least once. This never ends.

        Requesting the next event acknowledges the previous one.
        """
        return assembly.open_events(self.settings).read(group, consumer)

    def workers(self, zone: str | None = None) -> list[WorkerStatus]:
        """Return the workers with zone, lanes, capacity, version, and the state Up, Draining or Down."""
        return assembly.open_registry(self.settings).workers(zone)

    def close(self) -> None:
        """Close the connections."""
        self._ledger.close()

    def send_wakeup(self, record: Record) -> None:
        """Send the message of a queued job. Without it the reaper of a worker does, some seconds later."""
        # Importing Celery takes half a second. Callers that only read jobs do not need it.
        from .wiring.celery_sender import send_wakeup

        send_wakeup(self.settings, record)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
