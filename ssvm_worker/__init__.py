"""Library and command line of the secondary storage worker. The Celery tasks are in ``tasks``."""

__version__ = "0.2.0"
