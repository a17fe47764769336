"""``python -m api`` with a proposer, which no flag asks for.

OCTAVO_TEST_SPECULATIVE is a ``SpeculativeConfig`` in JSON, OCTAVO_TEST_RANKS how many ranks compute the same.
"""

from __future__ import annotations

import os
import sys

import msgspec

from engine_core import launch
from engine_core.config import SpeculativeConfig

_launch = launch.launch_engine_core


def _with_drafts(given: launch.EngineCoreLaunch) -> launch.ChildProcess:
    replace, executor = msgspec.structs.replace, given.config.executor
    speculative = msgspec.json.decode(os.environ["OCTAVO_TEST_SPECULATIVE"], type=SpeculativeConfig)
    parallel = replace(executor.parallel, num_mirrors=int(os.environ.get("OCTAVO_TEST_RANKS", "1")))
    executor = replace(executor, speculative=speculative, parallel=parallel)
    return _launch(replace(given, config=replace(given.config, executor=executor)))


if __name__ == "__main__":
    setattr(launch, "launch_engine_core", _with_drafts)  # noqa: B010
    from api.cli import main  # takes the function from there

    sys.exit(main())
