"""The Celery app of ``python -P -m tasks worker``, with the settings that its environment names."""

from __future__ import annotations

from ssvm_worker.config import load
from ssvm_worker.errors import WorkerError

from .factory import make_app
from .lifecycle import attach
from .safe_repr import SafeRequest

settings = load()
app = make_app(settings)
attach(app, settings)

#: Options of every task. A WorkerError is an outcome and no crash, so Celery logs it without a traceback.
TASK = {"bind": True, "throws": (WorkerError,), "Request": SafeRequest}
#: Options of the tasks that run jobs.
JOB = {**TASK, "Strategy": "tasks.claim_strategy:strategy"}
