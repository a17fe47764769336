"""The ``octavo`` command, also as ``python -m api``."""

import os
import sys


def main() -> int:
    """Runs the command line. Returns the exit code."""
    leave_current_folder()
    from api.cli import main as run

    return run()


def leave_current_folder() -> None:
    """Removes the current folder from the module search path.

    ``python -m`` and empty or relative entries of PYTHONPATH put it first, so a ``json.py`` that happens to be there
    would be run. Folders that PYTHONPATH names by absolute path stay, and so does the folder of these packages.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    keep = {os.path.realpath(entry) for entry in entries if os.path.isabs(entry)}
    keep.add(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    drop = {os.path.realpath(entry) for entry in ("", *entries) if not os.path.isabs(entry)} - keep
    library = os.path.dirname(os.__file__)  # this entry and all after it are Python's own
    end = sys.path.index(library) if library in sys.path else len(sys.path)
    sys.path[:end] = [entry for entry in sys.path[:end] if os.path.realpath(entry) not in drop]


if __name__ == "__main__":
    sys.exit(main())
