"""``octavo bench serve`` from a checkout that is not installed; ``api/commands/bench/serve.py`` says what it does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from api.commands.bench.serve import main

if __name__ == "__main__":
    sys.exit(main())
