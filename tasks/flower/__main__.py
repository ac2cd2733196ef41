"""Run Flower with the pages of this package, for a trial. In production it reads config/flower/flowerconfig.py."""

from __future__ import annotations

import sys

from tasks.__main__ import main

from . import install

install()
main(["flower", *sys.argv[1:]])
