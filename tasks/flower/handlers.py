"""Flower's side of the ledger: what its pages ask, and what their buttons do."""

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

#: Flower's paths that are named unlike Celery's commands.
_COMMANDS = {
    "timeout": "time_limit",
    "rate-limit": "rate_limit",
    "restart": "pool_restart",
    "grow": "pool_grow",
    "shrink": "pool_shrink",
    "add-consumer": "add_consumer",
    "cancel-consumer": "cancel_consumer",
}
#: Jobs on the page, and ids in one question.
_JOBS, _IDS = 200, 300


@cache
def _settings() -> Settings:
    return load()


@cache
def _stores() -> StoreWatch:
    return StoreWatch(None)


def user_of(handler: BaseApiHandler) -> str:
    """The name of whoever is logged in; empty if nobody is."""
    known = handler.current_user
    if isinstance(known, str) or not known:
        return known or ""
    words = handler.request.headers.get("Authorization", "").split()
    return base64.b64decode(words[-1]).decode().partition(":")[0] if len(words) == 2 else "flower"


class _OfJobs(BaseApiHandler):  # type: ignore[misc]
    """Knows who asks, and whether he may change anything; Flower itself sees to the login and the origin."""

    def initialize(self, readers: Collection[str]) -> None:
        self._readers = readers

    @property
    def may_act(self) -> bool:
        """Whether there are buttons."""
        return not self.application.options.read_only and user_of(self) not in self._readers

    async def act(self, verb: str, task_id: str) -> dict[str, Any]:
        """The job's new state, or why not; the status is set."""
        if not self.may_act:
            raise HTTPError(403, "%s may only look", user_of(self))
        return await self.ask(_act, verb, task_id, f"{user_of(self)} (flower)")

    async def ask(self, question: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
        """What *question* finds in the ledger, in a thread; else its error as a message, with the status for it."""
        status, values = await self.run_blocking(question.__name__, "the ledger", _tried, question, *given)
        self.set_status(status)
        return values  # type: ignore[no-any-return]

    def answer(self, values: Any) -> None:
        """As JSON."""
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(values))


class States(_OfJobs):
    """The state of the job behind each Celery task of ``ids``."""

    @authenticated
    async def get(self) -> None:
        """{task id: {job_id, state}}; a task that is no job's is left out."""
        ids = [each for each in (self.get_argument("ids", "") or "").split(",") if each][:_IDS]
        self.answer({"may_act": self.may_act} | await self.ask(_states, ids))


class Act(_OfJobs):
    """Retry or cancel, through the ledger, by the name of whoever is logged in."""

    @authenticated
    async def post(self, verb: str, task_id: str) -> None:
        """200 and the job's state; 404, or 409 with the reason, and nothing has changed."""
        self.answer(await self.act(verb, task_id))


class Apply(_OfJobs):
    """Flower's POST /api/task/apply/ssvm.retry, which waits for a result: answered here, since jobs have none there."""

    @authenticated
    async def post(self, verb: str) -> None:
        """As ``Act``, in the form of Flower's own answer; the body is ``{"args": ["ID"]}``."""
        try:
            [task_id] = json.loads(self.request.body)["args"]
        except (ValueError, KeyError, TypeError) as error:
            raise HTTPError(400, 'the body is {"args": ["ID"]}') from error
        values = await self.act(verb, str(task_id["job_id"] if isinstance(task_id, dict) else task_id))
        state = "SUCCESS" if self.get_status() == 200 else "FAILURE"
        self.answer({"task-id": task_id, "state": state, "result": values})


class Revoke(_OfJobs):
    """Flower's POST /api/task/revoke/ID, with or without ``terminate``: the job is cancelled through the ledger."""

    @authenticated
    async def post(self, task_id: str) -> None:
        """As ``Act``, with the ``message`` that Flower shows."""
        values = await self.act("cancel", task_id)
        self.answer({"message": f"Job {values.get('job_id')} is {values.get('state')}; it was asked to stop"} | values)


class Refuse(_OfJobs):
    """Commands of Flower that would contradict the settings of workers."""

    @authenticated
    async def post(self, command: str, _of: str) -> None:
        """409, with what to do in place of it."""
        self.set_status(409)
        remedy = REFUSED.get(_COMMANDS.get(command, command), "Cancel the job: ssvm cancel ID")
        self.answer({"message": f"{command} is refused. {remedy}"})


class JobsList(_OfJobs):
    """What the page of jobs shows."""

    @authenticated
    async def get(self) -> None:
        """Lanes, workers and the newest jobs, of one state if ``state`` names it."""
        state = self.get_argument("state", "") or None
        self.answer({"may_act": self.may_act} | await self.ask(_overview, state))


class JobsPage(BaseHandler):  # type: ignore[misc]
    """The page of jobs; a script fills it."""

    def initialize(self, readers: Collection[str]) -> None:
        """Who only looks has the same page, without buttons."""

    @authenticated
    def get(self) -> None:
        """The empty page."""
        self.render("ssvm_jobs.html")


def _states(task_ids: list[str]) -> dict[str, Any]:
    with open_ledger(_settings()) as ledger:
        found = {task_id: job_of_task(ledger, task_id) for task_id in task_ids}
    return {"jobs": {task_id: {"job_id": it.job_id, "state": it.state} for task_id, it in found.items() if it}}


def _tried(question: Callable[..., dict[str, Any]], *given: Any) -> tuple[int, dict[str, Any]]:
    try:
        return 200, question(*given)
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
        jobs = [_row(shown(record)) for record in ledger.page(state=state, limit=_JOBS)]
    lanes = [vars(each) for each in open_figures(_settings()).lanes()]
    workers = [each.to_dict() for each in open_registry(_settings()).workers()]
    return {"jobs": jobs, "lanes": lanes, "workers": workers, "stores": _stores().rows()}


def _row(record: dict[str, Any]) -> dict[str, Any]:
    row = {name: record[name] for name in ("job_id", "job", "zone", "lane", "state", "progress", "created")}
    error = record["error"] or {}
    by = [each["retried_by"] for each in record["attempts"] if each.get("retried_by")]
    number = record["attempts"][-1]["number"] if record["attempts"] else 0
    return row | {"error": error.get("message", ""), "attempts": number, "retried_by": by[-1:]}
