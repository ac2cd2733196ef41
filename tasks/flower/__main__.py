"""Flower with our pages, for a look; in operation it reads config/flower/flowerconfig.py."""

from __future__ import annotations

import sys

from tasks.__main__ import main

from . import install

install()
main(["flower", *sys.argv[1:]])
