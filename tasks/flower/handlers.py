"""Handlers of Flower's pages: they read the ledger, and their buttons retry and cancel jobs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

from flower.api import BaseApiHandler
from tornado.web import HTTPError, authenticated

from ssvm_worker.config import load
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import NOT_THERE, ObjectNotFound, WorkerError
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import Record
from ssvm_worker.ledger.workers import DOWN
from ssvm_worker.operations.health import StoreWatch
from ssvm_worker.units import human_duration, human_size
from ssvm_worker.wiring.assembly import open_job_metrics, open_ledger, open_registry
from ssvm_worker.wiring.celery_sender import job_of_task, send_wakeup
from tasks.remote_control import REFUSED

from .job_list import JobQuery, list_jobs
from .job_view import clock, details

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
#: The largest number of jobs in one request.
_MAX_IDS = 300


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


class JobHandler(BaseApiHandler):  # type: ignore[misc]
    """A handler that knows the user and their rights. Flower itself checks the login and the origin."""

    def initialize(self, readers: Collection[str]) -> None:
        """Accept the logins that may only read."""
        self._readers = readers

    @property
    def may_act(self) -> bool:
        """Return whether the user may change jobs. Without this right the page has no buttons."""
        return not self.application.options.read_only and user_of(self) not in self._readers

    async def act(self, change: Callable[..., dict[str, Any]], verb: str, which: Any) -> dict[str, Any]:
        """Run *change*, which retries or cancels. Return its result, or an error, and set the HTTP status."""
        if not self.may_act:
            self.set_status(403)
            return {"message": f"{user_of(self) or 'This login'} may only read jobs. Log in as another user"}
        return await self.ask(change, verb, which, f"{user_of(self)} (flower)")

    async def ask(self, query: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """Run *query* in a thread. Return its result, or its error as ``message``, and set the HTTP status."""
        status, values = await self.run_blocking(query.__name__, "the ledger", _run_query, query, *args)
        self.set_status(status)
        return values  # type: ignore[no-any-return]

    @property
    def root(self) -> str:
        """Return the URL prefix of Flower, with a slash at its beginning; "" without a prefix."""
        prefix = (self.application.options.url_prefix or "").strip("/")
        return f"/{prefix}" if prefix else ""

    def show(self, template: str, values: dict[str, Any]) -> None:
        """Send a page, or a page with the ``message`` of a query that failed."""
        if "message" in values:
            template = "ssvm_message.html"
        self.render(template, may_act=self.may_act, root=self.root, now=clock(), **values)

    def answer(self, values: Any) -> None:
        """Send JSON."""
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(values))


class States(JobHandler):
    """The states of the jobs of the Celery tasks in ``ids``."""

    @authenticated
    async def get(self) -> None:
        """Send {task id: {job_id, state}}. Tasks without a job are omitted."""
        ids = [each for each in (self.get_argument("ids", "") or "").split(",") if each][:_MAX_IDS]
        self.answer({"may_act": self.may_act} | await self.ask(_states, ids))


class Act(JobHandler):
    """Retry or cancel a job in the ledger, in the user's name."""

    @authenticated
    async def post(self, verb: str, task_id: str) -> None:
        """Send 200 with the job's state. 404 and 409 have a reason, and the job has not changed."""
        self.answer(await self.act(_act, verb, task_id))


class Apply(JobHandler):
    """Flower's POST /api/task/apply/ssvm.retry. Flower waits for a result that these tasks do not have."""

    @authenticated
    async def post(self, verb: str) -> None:
        """Do the same as ``Act``, with Flower's form of response. The body is ``{"args": ["ID"]}``."""
        try:
            [task_id] = json.loads(self.request.body)["args"]
        except (ValueError, KeyError, TypeError) as error:
            raise HTTPError(400, 'the body is {"args": ["ID"]}') from error
        values = await self.act(_act, verb, str(task_id["job_id"] if isinstance(task_id, dict) else task_id))
        state = "SUCCESS" if self.get_status() == 200 else "FAILURE"
        self.answer({"task-id": task_id, "state": state, "result": values})


class Revoke(JobHandler):
    """Flower's POST /api/task/revoke/ID, with or without ``terminate``: it cancels the job in the ledger."""

    @authenticated
    async def post(self, task_id: str) -> None:
        """Do the same as ``Act``, with the ``message`` that Flower shows."""
        values = await self.act(_act, "cancel", task_id)
        text = f"Job {values.get('job_id')} is {values.get('state')}; its worker was asked to stop"
        self.answer({"message": text} | values)


class Refuse(JobHandler):
    """Flower's commands that would contradict the settings of workers."""

    @authenticated
    async def post(self, command: str, _of: str) -> None:
        """Send 409 and the remedy."""
        self.set_status(409)
        remedy = REFUSED.get(_COMMANDS.get(command, command), "Cancel the job: ssvm cancel ID")
        self.answer({"message": f"{command} is refused. {remedy}"})


class Home(JobHandler):
    """Flower's first page."""

    def get(self) -> None:
        """Send the browser to the page of jobs."""
        self.redirect(f"{self.root}/jobs")


class JobPage(JobHandler):
    """The page of one job."""

    @authenticated
    async def get(self, job_id: str) -> None:
        """Send the page of a job, or of the job of a Celery task."""
        values = await self.ask(_details, job_id)
        self.show("ssvm_job.html", values | {"has_task": job_id in self.application.events.state.tasks})


class JobsPage(JobHandler):
    """The page of all jobs."""

    @authenticated
    async def get(self) -> None:
        """Send the page. The URL has the filters, the order and the number of the page."""
        given = {name: self.get_query_argument(name) for name in self.request.query_arguments}
        self.show("ssvm_jobs.html", await self.ask(_list, given))


class ActOnMany(JobHandler):
    """Retry or cancel several jobs in the ledger, in the user's name."""

    @authenticated
    async def post(self, verb: str) -> None:
        """Send the number of changed jobs and the refusals. The body is ``{"ids": […]}`` or ``{"query": "?…"}``."""
        try:
            given = json.loads(self.request.body)
            ids, query = given.get("ids"), dict(parse_qsl(str(given.get("query") or "").removeprefix("?")))
            if (ids is None) == ("query" not in given) or not isinstance(ids, list | None):
                raise ValueError
        except (ValueError, AttributeError) as error:
            raise HTTPError(400, 'the body is {"ids": ["ID"]} or {"query": "?state=failed"}') from error
        self.answer(await self.act(_act_on_many, verb, ids or query))


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
    except NOT_THERE as error:  # the broker is away, or refuses the password
        return 503, {"message": str(error)}
    except WorkerError as error:
        return 409, {"message": str(error)}


def _act(verb: str, task_id: str, by: str) -> dict[str, Any]:
    with open_ledger(_settings()) as ledger:
        found = job_of_task(ledger, task_id)
        if found is None:
            raise ObjectNotFound("There is no such job", task_id, "`ssvm jobs` lists them")
        record = _change(ledger, verb, found.job_id, by)
    return {"job_id": record.job_id, "state": record.state}


def _change(ledger: Ledger, verb: str, job_id: str, by: str) -> Record:
    if verb == "cancel":
        return ledger.cancel(job_id, by)
    record = ledger.retry(job_id, by)
    send_wakeup(_settings(), record)
    return record


def _details(task_id: str) -> dict[str, Any]:
    with open_ledger(_settings()) as ledger:
        if not (record := job_of_task(ledger, task_id)):
            raise ObjectNotFound("There is no such job", task_id, "The page Jobs lists all jobs")
    return {"job": details(record, _settings())}


def _act_on_many(verb: str, which: list[Any] | dict[str, str], by: str) -> dict[str, Any]:
    """Change the jobs with these ids, or those that a query of the page selects. Return the number and the refusals."""
    done, refused, has_more = 0, [], False
    with open_ledger(_settings()) as ledger:
        if isinstance(which, list):
            ids = [str(each) for each in which[:_MAX_IDS]]
        else:
            query = JobQuery.parse(which)
            # Without a state, a retry means failed jobs. A cancelled job was cancelled on purpose.
            states = ("queued", "running") if verb == "cancel" else (query.given.get("state", "failed"),)
            wanted = [each.job_id for each in query.find(ledger) if each.state in states]
            ids, has_more = wanted[:_MAX_IDS], len(wanted) > _MAX_IDS
        for job_id in ids:
            try:
                _change(ledger, verb, job_id, by)
                done += 1
            except NOT_THERE:
                raise
            except WorkerError as error:
                refused.append({"job_id": job_id, "message": str(error)})
    return {"done": done, "refused": refused, "has_more": has_more}


def _list(given: dict[str, str]) -> dict[str, Any]:
    query = JobQuery.parse(given)
    with open_ledger(_settings()) as ledger:
        values = list_jobs(ledger, _settings(), query)
    return values | {"overview": _overview()}


def _overview() -> list[tuple[str, Sequence[str], list[tuple[bool, Sequence[Any]]], str]]:
    """Return the tables below the jobs: title, heads, rows, and the text for no rows. True marks a row as bad."""
    with closing(open_job_metrics(_settings())) as counters, closing(open_registry(_settings())) as registry:
        lanes, workers = counters.lanes(), registry.workers()
    lane_rows: list[tuple[bool, Sequence[Any]]] = [
        (False, (each.zone, each.lane, *(each.counts.get(name, 0) for name in ("queued", "running", "failed")),
                 human_duration(each.oldest_s) if each.oldest_s else ""))
        for each in lanes
    ]  # fmt: skip
    worker_rows: list[tuple[bool, Sequence[Any]]] = [
        (each.state == DOWN, (each.info.name, each.state, each.info.zone, ", ".join(each.info.lanes),
                              f"{each.info.active} of {each.info.capacity}"))
        for each in workers
    ]  # fmt: skip
    store_rows: list[tuple[bool, Sequence[Any]]] = [
        (each["state"] != "up", (each["name"], each.get("error") or each["state"],
                                 *(human_size(each[name]) if name in each else "" for name in ("used", "free")),
                                 f"{each['latency_ms']:.0f} ms" if "latency_ms" in each else ""))
        for each in _stores().rows()
    ]  # fmt: skip
    stores = ("Store", "State", "Used", "Free", "Answers in")
    return [
        ("Zones", ("Zone", "Lane", "Queued", "Running", "Failed", "Oldest waits"), lane_rows, "No zone has jobs."),
        ("Workers", ("Worker", "State", "Zone", "Lanes", "Busy"), worker_rows, "No worker is known: start one."),
        ("Stores", stores, store_rows, "Flower examines the stores once a minute."),
    ]
