"""Runs one command and prints its cost as JSON on the last line. This is a separate, small program.

The kernel adds the memory of the parent at the fork to the peak memory of a child. So a benchmark process that has
loaded an SDK cannot measure the peak of curl. This program uses about 10 MiB, which is the lowest peak it can report.
"""

import json
import os
import sys
import time


def main(command: list[str]) -> None:
    """Print wall and CPU seconds, peak RSS in bytes and the exit status of *command*. Send its output to stderr."""
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
