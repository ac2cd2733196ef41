"""Runs one command and tells, as JSON on its last line, what it cost. Run as a program of its own: it is small.

The kernel counts into a child's peak memory what its parent held when it was forked, so a bench with an SDK in it
cannot ask for the peak of curl. This program holds some 10 MiB, and no contender can be seen to stay below that.
"""

import json
import os
import sys
import time


def main(command: list[str]) -> None:
    """Print wall and CPU seconds, peak RSS in bytes and the exit status of *command*; its output goes to stderr."""
    started = time.perf_counter()
    child = os.fork()
    if not child:
        try:
            os.dup2(2, 1)
            os.execv(command[0], command)
        finally:
            os._exit(127)
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - started
    cost = {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss * 1024}
    print(json.dumps(cost | {"status": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main(sys.argv[1:])
