"""Handlers of Flower's pages: they read the ledger, and their buttons retry and cancel jobs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado.web import HTTPError, authenticated

from ssvm_worker.config import load
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ObjectNotFound, StoreUnavailable, WorkerError
from ssvm_worker.operations.store_health import StoreWatch
from ssvm_worker.wiring.assembly import open_figures, open_ledger, open_registry, shown
from ssvm_worker.wiring.celery_sender import job_of_task, ring
from tasks.remote_control import REFUSED

#: Celery's command for Flower's paths that have another name.
_COMMANDS = {
    "timeout": "time_limit",
    "rate-limit": "rate_limit",
    "restart": "pool_restart",
    "grow": "pool_grow",
    "shrink": "pool_shrink",
    "add-consumer": "add_consumer",
    "cancel-consumer": "cancel_consumer",
}
#: The largest numbers of jobs on the page, and of ids in one request.
_MAX_JOBS, _MAX_IDS = 200, 300


@cache
def _settings() -> Settings:
    return load()


@cache
def _stores() -> StoreWatch:
    return StoreWatch(None)


def user_of(handler: BaseApiHandler) -> str:
    """Return the user's login name; "" without a login."""
    known = handler.current_user
    if isinstance(known, str) or not known:
        return known or ""
    words = handler.request.headers.get("Authorization", "").split()
    return base64.b64decode(words[-1]).decode().partition(":")[0] if len(words) == 2 else "flower"


class _OfJobs(BaseApiHandler):  # type: ignore[misc]
    """A handler that knows the user and their rights. Flower itself checks the login and the origin."""

    def initialize(self, readers: Collection[str]) -> None:
        self._readers = readers

    @property
    def may_act(self) -> bool:
        """Return whether the user may change jobs. Without this right the page has no buttons."""
        return not self.application.options.read_only and user_of(self) not in self._readers

    async def act(self, verb: str, task_id: str) -> dict[str, Any]:
        """Retry or cancel a job. Return its new state, or an error, and set the HTTP status."""
        if not self.may_act:
            raise HTTPError(403, "%s may only read", user_of(self))
        return await self.ask(_act, verb, task_id, f"{user_of(self)} (flower)")

    async def ask(self, query: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """Run *query* in a thread. Return its result, or its error as ``message``, and set the HTTP status."""
        status, values = await self.run_blocking(query.__name__, "the ledger", _run_query, query, *args)
        self.set_status(status)
        return values  # type: ignore[no-any-return]

    def answer(self, values: Any) -> None:
        """Send JSON."""
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(values))


class States(_OfJobs):
    """The states of the jobs of the Celery tasks in ``ids``."""

    @authenticated
    async def get(self) -> None:
        """Send {task id: {job_id, state}}. Tasks without a job are omitted."""
        ids = [each for each in (self.get_argument("ids", "") or "").split(",") if each][:_MAX_IDS]
        self.answer({"may_act": self.may_act} | await self.ask(_states, ids))


class Act(_OfJobs):
    """Retry or cancel a job in the ledger, in the user's name."""

    @authenticated
    async def post(self, verb: str, task_id: str) -> None:
        """Send 200 with the job's state. 404 and 409 have a reason, and the job has not changed."""
        self.answer(await self.act(verb, task_id))


class Apply(_OfJobs):
    """Flower's POST /api/task/apply/ssvm.retry. Flower waits for a result that these tasks do not have."""

    @authenticated
    async def post(self, verb: str) -> None:
        """Do the same as ``Act``, with Flower's form of response. The body is ``{"args": ["ID"]}``."""
        try:
            [task_id] = json.loads(self.request.body)["args"]
        except (ValueError, KeyError, TypeError) as error:
            raise HTTPError(400, 'the body is {"args": ["ID"]}') from error
        values = await self.act(verb, str(task_id["job_id"] if isinstance(task_id, dict) else task_id))
        state = "SUCCESS" if self.get_status() == 200 else "FAILURE"
        self.answer({"task-id": task_id, "state": state, "result": values})


class Revoke(_OfJobs):
    """Flower's POST /api/task/revoke/ID, with or without ``terminate``: it cancels the job in the ledger."""

    @authenticated
    async def post(self, task_id: str) -> None:
        """Do the same as ``Act``, with the ``message`` that Flower shows."""
        values = await self.act("cancel", task_id)
        text = f"Job {values.get('job_id')} is {values.get('state')}; its worker was asked to stop"
        self.answer({"message": text} | values)


class Refuse(_OfJobs):
    """Flower's commands that would contradict the settings of workers."""

    @authenticated
    async def post(self, command: str, _of: str) -> None:
        """Send 409 and the remedy."""
        self.set_status(409)
        remedy = REFUSED.get(_COMMANDS.get(command, command), "Cancel the job: ssvm cancel ID")
        self.answer({"message": f"{command} is refused. {remedy}"})


class JobsList(_OfJobs):
    """The content of the page of jobs."""

    @authenticated
    async def get(self) -> None:
        """Send lanes, workers, stores and the newest jobs, only those of ``state`` if it is given."""
        state = self.get_argument("state", "") or None
        self.answer({"may_act": self.may_act} | await self.ask(_overview, state))


class JobsPage(BaseHandler):  # type: ignore[misc]
    """The page of jobs. A script fills it."""

    def initialize(self, readers: Collection[str]) -> None:
        """Accept *readers*. They get the same page, and the script shows no buttons."""

    @authenticated
    def get(self) -> None:
        """Send the empty page."""
        self.render("ssvm_jobs.html")


def _states(task_ids: list[str]) -> dict[str, Any]:
    with open_ledger(_settings()) as ledger:
        found = {task_id: job_of_task(ledger, task_id) for task_id in task_ids}
    jobs = {task_id: {"job_id": record.job_id, "state": record.state} for task_id, record in found.items() if record}
    return {"jobs": jobs}


def _run_query(query: Callable[..., dict[str, Any]], *args: Any) -> tuple[int, dict[str, Any]]:
    try:
        return 200, query(*args)
    except ObjectNotFound as error:
        return 404, {"message": str(error)}
    except StoreUnavailable as error:
        return 503, {"message": str(error)}
    except WorkerError as error:
        return 409, {"message": str(error)}


def _act(verb: str, task_id: str, by: str) -> dict[str, Any]:
    with open_ledger(_settings()) as ledger:
        found = job_of_task(ledger, task_id)
        if found is None:
            raise ObjectNotFound("There is no such job", task_id, "`ssvm jobs` lists them")
        record = ledger.retry(found.job_id, by) if verb == "retry" else ledger.cancel(found.job_id, by)
        if verb == "retry":
            ring(_settings(), record)
    return {"job_id": record.job_id, "state": record.state}


def _overview(state: str | None) -> dict[str, Any]:
    with open_ledger(_settings()) as ledger:
        jobs = [_row(shown(record)) for record in ledger.page(state=state, limit=_MAX_JOBS)]
    lanes = [vars(each) for each in open_figures(_settings()).lanes()]
    workers = [each.to_dict() for each in open_registry(_settings()).workers()]
    return {"jobs": jobs, "lanes": lanes, "workers": workers, "stores": _stores().rows()}


def _row(record: dict[str, Any]) -> dict[str, Any]:
    row = {name: record[name] for name in ("job_id", "job", "zone", "lane", "state", "progress", "created")}
    error = record["error"] or {}
    by = [each["retried_by"] for each in record["attempts"] if each.get("retried_by")]
    number = record["attempts"][-1]["number"] if record["attempts"] else 0
    return row | {"error": error.get("message", ""), "attempts": number, "retried_by": by[-1:]}
