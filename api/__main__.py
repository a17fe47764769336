"""The ``octavo`` command, also as ``python -m api``."""

import os
import sys


def main() -> int:
    """Runs the command line. Returns the exit code."""
    leave_current_folder()
    from api.cli import main as run

    return run()


def leave_current_folder() -> None:
    """Takes the current folder out of the module search path.

    ``python -m`` puts it first, and so does an empty or relative entry of PYTHONPATH. A ``json.py`` that happens to lie
    there is not ours to run. A folder that PYTHONPATH names in full stays, and so does the one of these packages.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    keep = {os.path.realpath(entry) for entry in entries if os.path.isabs(entry)}
    keep.add(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    drop = {os.path.realpath(entry) for entry in ("", *entries) if not os.path.isabs(entry)} - keep
    library = os.path.dirname(os.__file__)  # what comes from it on is Python's own choice
    end = sys.path.index(library) if library in sys.path else len(sys.path)
    sys.path[:end] = [entry for entry in sys.path[:end] if os.path.realpath(entry) not in drop]


if __name__ == "__main__":
    sys.exit(main())
