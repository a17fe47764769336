"""What is known of tokens before they are sampled: their random numbers.

The token at an index of an output is the first, in the order of ids, at which the sum of probabilities exceeds a number
that depends on the seed and the index alone (``ops/reference/sampling.py``). So a draft is accepted if the number falls
into its part of [0, 1), which begins where the tokens with smaller ids end. If these have their usual share of what the
draft leaves, it is accepted if its probability exceeds a bound that the number gives. A bound near 0 lets almost any
draft pass, one near 1 only what is certain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from executor.request_states import RequestStates
from ops.reference.sampling import uniform

F64 = npt.NDArray[np.float64]

CHUNK = 64
"""Numbers of a request that are computed at once."""
SEARCHED = 512
"""Last tokens of a request from which usual shares are known."""
MAX_EASE = 4.0


NOTHING: tuple[int, F64] = 0, np.empty(0)


class KnownNumbers:
    """The random numbers of the next tokens. State by slot is reset by ``add``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._chunks: list[tuple[int, F64]] = [NOTHING] * max_num_seqs
        """Index of the first number, and numbers."""

    def add(self, slot: int) -> None:
        """Forgets what is known of a slot."""
        self._chunks[slot] = NOTHING

    def eases(self, slot: int, tokens: Sequence[int], states: RequestStates) -> list[float]:
        """How easily each draft of a slot is accepted: the log odds that a probability, of which nothing is known,
        exceeds the bound. 0 where nothing is drawn.

        Args:
            slot: The slot.
            tokens: Its drafts.
            states: Tokens by slot.
        """
        params = states.params[slot]
        if params is None or params.temperature <= 0:
            return [0.0] * len(tokens)
        known = int(states.num_known[slot])
        numbers = self._numbers(slot, params.seed, known - int(states.num_prompt[slot]), len(tokens))
        text = states.token_ids[slot, max(0, known - SEARCHED) : known]
        ids = np.array(tokens, np.int32)[:, None]
        smaller = (text < ids).sum(1) + 0.5 * (text == ids).sum(1)
        shares = (smaller + 0.5) / (len(text) + 1)
        bounds = np.where(numbers < shares, 1 - numbers / shares, (numbers - shares) / (1 - shares))
        with np.errstate(divide="ignore"):
            eases: list[float] = np.clip(np.log(1 / bounds - 1), -MAX_EASE, MAX_EASE).tolist()
        return eases

    def _numbers(self, slot: int, seed: int, index: int, count: int) -> F64:
        first, numbers = self._chunks[slot]
        if not first <= index <= index + count <= first + len(numbers):
            size = max(CHUNK, count)
            numbers = uniform(np.full(size, seed, np.uint64), index + np.arange(size))
            first = index
            self._chunks[slot] = first, numbers
        return numbers[index - first : index - first + count]
