"""Resources that all models of a process share: threads, helper processes, event loop turns, seeds."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from api.admission import Turns
from api.config import ServerConfig
from api.model.template_renderer import TemplateRenderer
from engine_core.launch import get_logger

T = TypeVar("T")

logger = get_logger()

INLINE_TEXT = 2048
"""Maximum characters of a text that is tokenised in the event loop, where a thread would cost more."""
INLINE_STEPS = 4096
"""Maximum steps, of about a tenth of a microsecond each, of work that is done in the event loop."""


class Closable(Protocol):
    """Something with processes that end when it is closed."""

    def close(self) -> None: ...


class Host:
    """The resources that models share."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.templates = TemplateRenderer()
        self.threads = ThreadPoolExecutor(2, "text")
        self._turns = Turns(2 * INLINE_TEXT)
        """Budget for tokenising in the event loop and for work that costs as much."""
        self._seeds = None if config.seed is None else random.Random(config.seed)
        """Source of seeds for requests without one, if they must be the same after each start."""
        self._warnings: set[str] = set()
        self.helpers: list[Closable] = []
        """What else has processes: of single models."""

    def close(self) -> None:
        """Stops threads and helper processes."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for helper in (self.templates, *self.helpers):
            helper.close()

    def warn_once(self, message: str) -> None:
        """Logs a warning once. ``message`` must come from a fixed set, not from clients."""
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning("%s", message)

    async def spend_turn(self, cost: int) -> None:
        """Records work done in the event loop, and yields to other tasks when the budget is spent.

        Args:
            cost: Cost of the work as the number of characters that could be tokenised in the same time.
        """
        await self._turns.spend(cost)

    async def apart(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """Calls a function of about ``size`` steps: in a thread, or directly if the steps are few.

        The function may be Python code, since threads take turns, but must not make a single call that holds the GIL
        for long.
        """
        if size <= INLINE_STEPS:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)

    def draw_seed(self) -> int:
        """Draws a seed for a request without one."""
        return secrets.randbits(63) if self._seeds is None else self._seeds.getrandbits(63)
