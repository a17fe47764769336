"""How a second model, or a head, chooses drafts from its logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import ops
from executor.device.steps import StepChannel
from executor.messages import I32, I64, NewRequest
from executor.request_states import RequestStates
from executor.sampling.base import SampleRows
from executor.sampling.sampler import new_backend


class DraftSampler:
    """Chooses the likeliest token (``greedy``), or draws one as the large model will (``probabilistic``): with the
    request's temperature and filters, and with the random number of the same position.

    The likeliest token is right as often as the large model draws it. A drawn one is right where both models agree on
    the probabilities of tokens, also of those that are rare. Penalties and the like are left to the large model.
    """

    def __init__(self, method: str, max_num_seqs: int, device_type: str, channel: StepChannel | None = None) -> None:
        """
        Args:
            method: ``greedy`` or ``probabilistic``.
            max_num_seqs: Number of slots.
            device_type: Device type of the logits.
            channel: Channel to that device. Default: the host's memory.
        """
        self._is_greedy = method == "greedy"
        self._backend = new_backend(ops.op_set(device_type), max_num_seqs, channel)
        self._draws = np.zeros(max_num_seqs, np.bool_)

    def add(self, request: NewRequest) -> None:
        """Registers a request that enters a slot."""
        params = request.params
        self._draws[request.slot] = not self._is_greedy and params is not None and params.temperature > 0
        if params is not None:
            kept = ("temperature", "top_k", "top_p", "min_p", "seed")
            self._backend.add(request.slot, type(params)(**{name: getattr(params, name) for name in kept}))

    def sample(
        self,
        logits: Tensor,
        slots: I32,
        positions: I64,
        states: RequestStates,
        device_positions: Tensor | None = None,
    ) -> Tensor:
        """Chooses a token for each row.

        Args:
            logits: float32 [rows, vocab_size]; changed in place.
            slots: int32 [rows], each once.
            positions: int64 [rows]: positions of the drafts.
            states: Of all requests.
            device_positions: int64 [rows], on the device: the positions, of which the host has upper bounds. None: the
                host knows them.

        Returns:
            int64 [rows], on the device of the logits. A row of logits that are not finite has any token.
        """
        if not self._draws[slots].any():
            return torch.argmax(logits, 1)
        rows = SampleRows(slots, positions, np.arange(len(slots), dtype=np.int32), device_positions=device_positions)
        return self._backend.sample(logits, logits, rows, states, None).token_ids
