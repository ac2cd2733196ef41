"""Run ``ssvm`` as ``python -m ssvm_worker``."""

import sys
from pathlib import Path

# Python searches the current directory first. Files there may have the names of modules that this package imports.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from .cli import main

sys.exit(main())
