"""What is reported of log probabilities."""

from __future__ import annotations

import numpy as np
import torch

from executor.messages import TokenLogprobs
from ops.reference.sampling import log_probs


def describe(
    logits: torch.Tensor, token: int, count: int, row: int, position: int = 0, extra_ids: tuple[int, ...] = ()
) -> TokenLogprobs:
    """What a position has to say of log probabilities.

    Args:
        logits: float32 [vocab_size], as the model made them.
        token: The token that stands there.
        count: Number of most likely tokens to report, low ids first among equals; -1: all.
        row: Row of the step.
        position: See ``TokenLogprobs.position``.
        extra_ids: Tokens to report instead of the most likely ones.
    """
    return token_logprobs(log_probs(logits), token, count, row, position, extra_ids, order_by=logits)


def token_logprobs(
    logprobs: torch.Tensor,
    token: int,
    count: int,
    row: int,
    position: int,
    extra_ids: tuple[int, ...] = (),
    *,
    order_by: torch.Tensor | None = None,
) -> TokenLogprobs:
    """The same of log probabilities (float32 [vocab_size]) that are there already. ``order_by`` ranks the tokens."""
    scores = logprobs if order_by is None else order_by
    if extra_ids:
        others = torch.tensor(extra_ids)
    elif count:
        others = torch.sort(scores, descending=True, stable=True).indices[: None if count < 0 else count]
    else:
        others = torch.empty(0, dtype=torch.int64)
    ids = torch.cat((torch.tensor([token]), others))
    return TokenLogprobs(
        row=row,
        position=position,
        token_ids=ids.numpy().astype(np.int32).tobytes(),
        logprobs=logprobs[ids].numpy().astype(np.float32).tobytes(),
        rank=int((scores > scores[token]).sum()) + 1,
    )
