"""``python -m api`` with two ranks that compute the same: no flag asks for that."""

from __future__ import annotations

import sys

import msgspec

from engine_core import launch

_launch = launch.launch_engine_core


def _with_two_ranks(given: launch.EngineCoreLaunch) -> launch.ChildProcess:
    executor = given.config.executor
    parallel = msgspec.structs.replace(executor.parallel, num_mirrors=2)
    executor = msgspec.structs.replace(executor, parallel=parallel)
    return _launch(msgspec.structs.replace(given, config=msgspec.structs.replace(given.config, executor=executor)))


if __name__ == "__main__":
    setattr(launch, "launch_engine_core", _with_two_ranks)  # noqa: B010
    from api.cli import main  # takes the function from there

    sys.exit(main())
