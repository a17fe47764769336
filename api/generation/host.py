"""What a process that serves has once, whatever it serves: threads, helpers, turns in the event loop, seeds."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from api.admission import Turns
from api.config import ServerConfig
from api.model.template_renderer import TemplateRenderer
from engine_core.launch import get_logger

T = TypeVar("T")

logger = get_logger()

INLINE_TEXT = 2048
"""Characters up to which a text is tokenised in the event loop: a thread costs more."""
INLINE_STEPS = 4096
"""Steps of about a tenth of a microsecond up to which work is done in the event loop."""


class Host:
    """Lends models what there is one of."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.templates = TemplateRenderer()
        self.threads = ThreadPoolExecutor(2, "text")
        self._turns = Turns(2 * INLINE_TEXT)
        """Of texts that are tokenised in the event loop, and of what costs as much."""
        self._seeds = None if config.seed is None else random.Random(config.seed)
        """Where requests without a seed get theirs, if it must be the same after each start."""
        self._warnings: set[str] = set()

    def close(self) -> None:
        """Ends threads and helper processes."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.templates.close()

    def warn_once(self, message: str) -> None:
        """Logs a warning, unless it was logged before. ``message`` comes from a closed set, not from clients."""
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning("%s", message)

    async def spend_turn(self, cost: int) -> None:
        """Takes note of work that was done in the event loop, and gives others their turn when it is enough.

        Args:
            cost: About how many characters could have been tokenised instead.
        """
        await self._turns.spend(cost)

    async def apart(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """Calls a function whose work is about that many steps: beside the event loop, unless they are few.

        It may be Python, since threads take turns. A single call that keeps the interpreter's lock for long may not.
        """
        if size <= INLINE_STEPS:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    def draw_seed(self) -> int:
        """A seed for a request that has none."""
        return secrets.randbits(63) if self._seeds is None else self._seeds.getrandbits(63)
