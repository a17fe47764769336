"""``python -m api``: the same as the ``octavo`` command."""

import sys

from api.cli import main

if __name__ == "__main__":
    sys.exit(main())
