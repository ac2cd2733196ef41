"""``python -m ssvm_worker`` is ``ssvm``."""

import sys
from pathlib import Path

# Python puts the current directory first, where files of others may have the names of our modules.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from .cli import main

sys.exit(main())
