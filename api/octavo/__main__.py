"""``python -m octavo``: the ``octavo`` command."""

import sys

from api.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
