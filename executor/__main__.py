"""A worker process: started by ``multiproc.py``, with its start message on standard input."""

from __future__ import annotations

import sys

from executor.process import become_child


def main() -> int:
    become_child("octavo worker")  # before the imports, which take seconds in which the parent may end
    from executor.worker import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
