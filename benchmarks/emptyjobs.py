"""A worker's app with three more tasks for the benchmarks of the queue: ``celery -A benchmarks.emptyjobs worker``.

- ``bench.bare``: a plain Celery task that does nothing
- ``ssvm.empty``: a job that does nothing
- ``ssvm.waiting``: a job that waits until it is cancelled
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ssvm_worker.jobs import JOBS, Job
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import JobRequest

#: The words after ``python -m`` that start a worker with this app.
APP = ("celery", "-A", "benchmarks.emptyjobs")


def _run(_: JobRequest, __: Attempt) -> dict[str, Any]:
    return {}


def _wait(_: JobRequest, attempt: Attempt) -> dict[str, Any]:
    attempt.wait(3600)
    return {}


def _job(name: str, run: Any) -> Job:
    module = SimpleNamespace(Request=JobRequest, run=run, discard=lambda *_: None, resource=lambda _: "")
    return Job(name, "maintenance", "For the benchmarks", lambda _: module)


EMPTY, WAITING = JOBS["empty"], JOBS["waiting"] = _job("empty", _run), _job("waiting", _wait)


def tasks() -> Any:
    """Return the app. It reads the settings that the environment names."""
    from ssvm_worker.runner.messages import Message
    from ssvm_worker.runner.run import run_job
    from tasks.app import JOB, app, settings

    @app.task(name="bench.bare")
    def bare() -> None:
        """Do nothing."""

    for name in ("empty", "waiting"):

        def run(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return run_job(settings, Message.of(task, args, kwargs))

        app.task(name=f"ssvm.{name}", **JOB)(run)
    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return tasks()
    raise AttributeError(name)
