"""``octavo bench serve`` for a checkout that is not installed; see ``api/commands/bench/serve.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from api.commands.bench.serve import main

if __name__ == "__main__":
    sys.exit(main())
