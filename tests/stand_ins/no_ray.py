"""The process that asks Ray, where Ray is not installed."""

import sys

from executor.nodes.ray_driver import main

sys.modules["ray"] = None  # type: ignore[assignment]
sys.exit(main())
