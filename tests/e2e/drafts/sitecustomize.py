"""Lets a server speculate: OCTAVO_TEST_SPECULATIVE is a ``SpeculativeConfig`` in JSON, which has no flag yet.

Python imports this at its start if the folder is in PYTHONPATH; the product knows nothing of it.
"""

from __future__ import annotations

import os
import sys

_config = os.environ.get("OCTAVO_TEST_SPECULATIVE", "")
if _config and "api" in sys.orig_argv:
    import msgspec
    from msgspec.structs import replace

    import api.model.files
    from api.config import ServerConfig
    from api.model.files import ModelFiles
    from executor.config import SpeculativeConfig

    _original = api.model.files.with_model

    def _with_model(config: ServerConfig, files: ModelFiles) -> ServerConfig:
        config = _original(config, files)
        speculative = msgspec.json.decode(_config, type=SpeculativeConfig)
        executor = replace(config.engine.executor, speculative=speculative)
        return replace(config, engine=replace(config.engine, executor=executor))

    api.model.files.with_model = _with_model
