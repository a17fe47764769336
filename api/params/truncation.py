"""Truncates prompts to the length that a request sets."""

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
    """Truncates a prompt to the length that the request sets.

    Args:
        token_ids: The prompt.
        keep: Maximum tokens to keep; None: all, -1: as many as fit the model with ``room`` after them.
        limits: The model's limits.
        around: Tokens that the tokenizer added around the text; they are kept.
        side: Side on which tokens are removed; None: left.
        room: Tokens to reserve after the prompt.
        max_own: First keep only this many leading tokens of the text itself; 0: all.

    Raises:
        RequestError: ``keep`` is 0, below -1, or more than the model's context.
    """
    if max_own:
        most = max_own + sum(around)
        token_ids = [token_ids[place] for place in kept_tokens(len(token_ids), most, "right", around)]
    if keep is None:
        return token_ids
    check_truncation(keep, limits)
    if keep == -1:
        keep = max(1, limits.max_model_len - room)
    return [token_ids[place] for place in kept_tokens(len(token_ids), keep, side or "left", around)]


def check_truncation(keep: int | None, limits: ModelLimits) -> None:
    """Checks a maximum length of prompts.

    Raises:
        RequestError: It is 0, below -1, or more than the model's context.
    """
    if keep is not None and (keep > limits.max_model_len or keep < -1 or keep == 0):
        raise RequestError(
            f"truncate_prompt_tokens must be -1, or between 1 and the maximum context length of "
            f"{limits.max_model_len}, got {keep}",
            "truncate_prompt_tokens",
        )


def output_room(max_tokens: int | None) -> int:
    """Tokens that a prompt must leave for its output."""
    return max(1, max_tokens or 1)
