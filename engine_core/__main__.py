"""The engine core process: started by ``launch.py``, with its start message on standard input.

``sys.argv`` names the modules of children to start first: a worker's imports take longer than all that happens here
before it is needed.
"""

from __future__ import annotations

import sys

from executor.process import become_child, prepare_child


def main() -> int:
    become_child("octavo engine_core")
    for module in sys.argv[1:]:
        prepare_child(module)
    from engine_core.process import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
