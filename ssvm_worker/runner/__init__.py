"""Run a claimed job; this package does not import Celery."""
