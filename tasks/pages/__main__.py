"""Flower with our pages, for a look; in operation it reads config/flower/flowerconfig.py."""

from __future__ import annotations

import sys

from celery.__main__ import main

from . import install

install()
sys.argv = ["celery", "-A", "tasks.app", "flower", *sys.argv[1:]]
main()
