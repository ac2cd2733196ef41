"""What we add to Flower: Retry and Cancel for jobs, and a page of all jobs. ``install`` is called by its config file.

Flower executes its configuration before it builds its application, so its list of handlers and its template loader can
be given more; no file of Flower's is copied. What is used of it is no declared API: the extra pins 2.2, and
tests/e2e/test_flower.py looks at the real thing.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from flower import urls
from flower.api import BaseApiHandler
from tornado.template import Loader
from tornado.web import HTTPError, StaticFileHandler, url

from .handlers import Act, Apply, JobsList, JobsPage, Refuse, Revoke, States, user_of

_HERE = Path(__file__).parent


class _Overlay(Loader):
    """Our templates before Flower's; ``@flower/NAME`` is always Flower's own."""

    def _create_template(self, name: str) -> Any:
        if name.startswith("@flower/"):
            self.root = urls.settings["template_path"]
            return super()._create_template(name.removeprefix("@flower/"))
        ours = _HERE / "templates"
        self.root = str(ours) if (ours / name).exists() else urls.settings["template_path"]
        return super()._create_template(name)

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:  # noqa: ARG002 - all lie side by side
        """Names are never relative."""
        return name


def install(readers: Collection[str] = ()) -> None:
    """Add our pages; the logins named by *readers* see them without any button, and change nothing. Safe to repeat."""
    if "template_loader" in urls.settings:
        return
    urls.settings["template_loader"] = _Overlay(str(_HERE / "templates"))
    given = {"readers": frozenset(readers)}
    _keep_from_changing(frozenset(readers))
    urls.handlers[:0] = [
        url(r"/api/task/apply/ssvm\.(retry|cancel)", Apply, given),
        url(r"/api/task/revoke/(.+)", Revoke, given),
        url(r"/api/task/(abort|timeout|rate-limit)/(.+)", Refuse, given),
        url(r"/api/worker/pool/(restart|grow|shrink|autoscale)/(.+)", Refuse, given),
        url(r"/api/worker/queue/(add-consumer|cancel-consumer)/(.+)", Refuse, given),
    ]
    # The last of Flower's takes every path there is.
    urls.handlers[-1:-1] = [
        url(r"/jobs", JobsPage, given, name="ssvm-jobs"),
        url(r"/ssvm/jobs", JobsList, given),
        url(r"/ssvm/states", States, given),
        url(r"/ssvm/(retry|cancel)/([A-Za-z0-9._-]{1,140})", Act, given),
        url(r"/ssvm/static/(.*)", StaticFileHandler, {"path": str(_HERE / "static")}),
    ]


def _keep_from_changing(readers: Collection[str]) -> None:
    """Flower's own API can run any task and stop workers; its read_only is for everybody or for nobody."""
    prepare = BaseApiHandler.prepare

    def prepare_and_look(handler: BaseApiHandler) -> None:
        prepare(handler)
        if handler.request.method == "POST" and user_of(handler) in readers:
            raise HTTPError(403, "%s may only look", user_of(handler))

    BaseApiHandler.prepare = prepare_and_look


def readers_of_environment() -> list[str]:
    """The names in FLOWER_READERS, with commas between them."""
    return [each.strip() for each in os.environ.get("FLOWER_READERS", "").split(",") if each.strip()]
