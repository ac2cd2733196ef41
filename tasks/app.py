"""``python -P -m tasks worker``: the app of this process, by the settings in its environment."""

from __future__ import annotations

from ssvm_worker.config import load
from ssvm_worker.errors import WorkerError

from . import logs
from .factory import make_app
from .lifecycle import attach
from .safe_repr import SafeRequest

settings = load()
app = make_app(settings)
attach(app, settings)
logs.attach(settings)

#: How every task is registered: a WorkerError is an answer, not a crash, so Celery logs it without a traceback.
TASK = {"bind": True, "throws": (WorkerError,), "Request": SafeRequest}
#: How the tasks are that run jobs.
JOB = {**TASK, "Strategy": "tasks.claim_strategy:strategy"}
