"""Lua scripts of the ledger. The broker runs one script at a time, by its own clock.

Each script is a file lua/NAME.lua. Its first comments state its arguments (ARGV) and its result.
A first line ``#!lua`` states how the broker runs the script when its memory is full:

- ``#!lua flags=allow-oom``: always. The script ends jobs, removes records, or adds little.
- ``#!lua flags=no-writes``: always. The script only reads. A full broker refuses reads inside MULTI.
- ``#!lua``: never. The broker refuses the script before it changes anything.
- no such line: until the first command that needs memory.

So a full broker refuses new jobs only. Its jobs can still be listed, run, ended and removed.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

from .redis_library import redis

#: The line of a script that names its parts, in their order. Each part is a file lua/include/NAME.lua.
_INCLUDE = re.compile(r"^-- include: (.+)\n", re.MULTILINE)


@cache
def load(name: str) -> str:
    """Return the text of lua/NAME.lua. The line ``-- include: PART …`` is replaced by the texts of these parts."""
    folder = files(__package__) / "lua"

    def parts(found: re.Match[str]) -> str:
        return "".join((folder / "include" / f"{part}.lua").read_text() for part in found[1].split())

    return _INCLUDE.sub(parts, (folder / f"{name}.lua").read_text())


def register(client: redis.Redis, *names: str) -> dict[str, Any]:
    """Return redis-py's scripts by name. A call of one runs it in the broker, by its digest where that is known."""
    return {name: client.register_script(load(name)) for name in names}
