"""``python -m ssvm_worker`` is ``ssvm``."""

import sys

from .cli import main

sys.exit(main())
