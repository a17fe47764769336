"""The vocabulary message, which each engine core needs once before it can use grammars."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from api.model.tokenizer import Tokenizer
from api.params.structured import vocabulary_frame
from engine_core.launch import get_logger

logger = get_logger()


class VocabularyFrame:
    """The encoded ``SetVocabulary`` message, created in a thread on first use.

    Attributes:
        frame: The encoded message; None: not created yet.
    """

    def __init__(self, on_made: Callable[[str], None]) -> None:
        """Prepares; ``make`` creates the frame.

        Args:
            on_made: Called with an empty string when the frame is ready, or with the reason why it failed.
        """
        self.frame: bytes | None = None
        self._on_made = on_made
        self._maker: asyncio.Task[None] | None = None

    def make(self, tokenizer: Tokenizer | None) -> None:
        """Starts to create the frame, unless this is already in progress.

        Args:
            tokenizer: The tokenizer whose tokens to send.
        """
        if self._maker is None:
            self._maker = asyncio.create_task(self._make(tokenizer))

    async def _make(self, tokenizer: Tokenizer | None) -> None:
        error = "structured outputs require a tokenizer"
        try:
            if tokenizer is not None:
                loop = asyncio.get_running_loop()
                self.frame = await loop.run_in_executor(None, vocabulary_frame, tokenizer)
        except Exception as problem:
            logger.exception("sending the vocabulary to the engine core failed")
            error = f"internal error: {problem}"
        self._maker = None
        self._on_made("" if self.frame is not None else error)

    def close(self) -> None:
        """Cancels the creation of the frame."""
        if self._maker is not None:
            self._maker.cancel()
