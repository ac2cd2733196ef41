"""Extensions of Flower: Retry and Cancel for jobs, and a page of all jobs. Its configuration file calls ``install``.

Flower executes its configuration before it creates its application. So ``install`` can add handlers and replace the
template loader, and no file of Flower is copied. This uses undocumented parts of Flower. Therefore the extra pins
version 2.2, and tests/e2e/test_flower.py tests the real program.
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

from .handlers import Act, ActOnMany, Apply, Home, JobPage, JobsPage, Refuse, Revoke, States, user_of

_HERE = Path(__file__).parent


class _Overlay(Loader):
    """A loader that prefers the templates of this package. ``@flower/NAME`` is always Flower's template."""

    def _create_template(self, name: str) -> Any:
        if name.startswith("@flower/"):
            self.root = urls.settings["template_path"]
            return super()._create_template(name.removeprefix("@flower/"))
        own = _HERE / "templates"
        self.root = str(own) if (own / name).exists() else urls.settings["template_path"]
        return super()._create_template(name)

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:  # noqa: ARG002 - one folder has all
        """Return the name, because names are never relative."""
        return name


def install(readers: Collection[str] = ()) -> None:
    """Add the pages and the handlers. Safe to repeat.

    The logins in *readers* see the pages without buttons, and cannot change anything.
    """
    if "template_loader" in urls.settings:
        return
    urls.settings["template_loader"] = _Overlay(str(_HERE / "templates"))
    given = {"readers": frozenset(readers)}
    _forbid_changes(frozenset(readers))
    urls.handlers[:0] = [
        url(r"/", Home, given),
        url(r"/api/task/apply/ssvm\.(retry|cancel)", Apply, given),
        url(r"/api/task/revoke/(.+)", Revoke, given),
        url(r"/api/task/(abort|timeout|rate-limit)/(.+)", Refuse, given),
        url(r"/api/worker/pool/(restart|grow|shrink|autoscale)/(.+)", Refuse, given),
        url(r"/api/worker/queue/(add-consumer|cancel-consumer)/(.+)", Refuse, given),
    ]
    # Flower's last handler accepts every path.
    urls.handlers[-1:-1] = [
        url(r"/jobs", JobsPage, given, name="ssvm-jobs"),
        url(r"/jobs/(.+)", JobPage, given),
        url(r"/ssvm/(retry|cancel)", ActOnMany, given),
        url(r"/ssvm/states", States, given),
        url(r"/ssvm/(retry|cancel)/([A-Za-z0-9._-]{1,140})", Act, given),
        url(r"/ssvm/static/(.*)", StaticFileHandler, {"path": str(_HERE / "static")}),
    ]


def _forbid_changes(readers: Collection[str]) -> None:
    """Refuse POST requests of *readers* to Flower's API, which can run any task and stop workers.

    Flower's own option read_only applies to all logins.
    """
    prepare = BaseApiHandler.prepare

    def prepare_and_check(handler: BaseApiHandler) -> None:
        prepare(handler)
        if handler.request.method == "POST" and user_of(handler) in readers:
            raise HTTPError(403, "%s may only read", user_of(handler))

    BaseApiHandler.prepare = prepare_and_check


def readers_of_environment() -> list[str]:
    """Return the names in the variable FLOWER_READERS, which are separated by commas."""
    return [each.strip() for each in os.environ.get("FLOWER_READERS", "").split(",") if each.strip()]
