"""The secondary storage worker: the library; everything but Celery."""

__version__ = "0.2.0"
