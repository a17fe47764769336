"""A worker process: started by ``multiproc.py``, with its start message on standard input."""

from __future__ import annotations

import os
import sys

from executor.process import become_child


def main() -> int:
    become_child("octavo worker")  # before the imports, which take seconds in which the parent may end
    usable = os.sched_getaffinity(0)
    from executor.worker import run

    # With OMP_PROC_BIND, libgomp has put this thread on one core, which all that it starts from now on would inherit.
    if os.sched_getaffinity(0) != usable:
        os.sched_setaffinity(0, usable)
    return run()


if __name__ == "__main__":
    sys.exit(main())
