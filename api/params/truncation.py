"""What stays of a prompt that is longer than a request wants."""

from __future__ import annotations

from typing import Literal

from api.errors import RequestError
from api.model.tokenizer import AddedAround, kept_tokens
from api.params.sampling import ModelLimits


def truncate_prompt(
    token_ids: list[int],
    keep: int | None,
    limits: ModelLimits,
    around: AddedAround,
    *,
    side: Literal["left", "right"] | None = None,
    room: int = 0,
    max_own: int = 0,
) -> list[int]:
    """A prompt, cut to the length that the request wants.

    Args:
        token_ids: The prompt.
        keep: Most tokens; None: all of them, -1: as many as the model takes with ``room`` behind them.
        limits: What the model takes.
        around: What the tokenizer added to the text; it stays.
        side: Where the others are cut off; None: left.
        room: Tokens that follow the prompt, as far as is known.
        max_own: Before that, use the first so many tokens of the text itself; 0: all.

    Raises:
        RequestError: ``keep`` is more than the model takes, or 0.
    """
    if max_own:
        most = max_own + sum(around)
        token_ids = [token_ids[place] for place in kept_tokens(len(token_ids), most, "right", around)]
    if keep is None:
        return token_ids
    if keep > limits.max_model_len or keep < -1 or keep == 0:
        raise RequestError(
            f"truncate_prompt_tokens must be -1, or between 1 and the maximum context length of "
            f"{limits.max_model_len}, got {keep}",
            "truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max(1, limits.max_model_len - room)
    return [token_ids[place] for place in kept_tokens(len(token_ids), keep, side or "left", around)]


def output_room(max_tokens: int | None) -> int:
    """Tokens that a prompt must leave for its output."""
    return max(1, max_tokens or 1)
