"""A proposer for tests, which knows the outputs in advance and can also propose wrong tokens."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, NewRequest, i32
from executor.request_states import RequestStates
from executor.speculative.base import Drafts


class Script(msgspec.Struct, frozen=True):
    """A prompt and its output."""

    prompt: list[int]
    output: list[int]


class ScriptedProposer:
    """Reads scripts from a file (a JSON list of ``Script``) and proposes their outputs for matching prompts.

    With ``wrong_every`` = n, each draft whose index in the output is a multiple of n is a wrong token.
    """

    def __init__(self, config: SpeculativeConfig, max_num_seqs: int) -> None:
        scripts = msgspec.json.decode(Path(config.script).read_bytes(), type=list[Script])
        self._outputs = {
            np.array(script.prompt, np.int32).tobytes(): _spoilt(script.output, config.wrong_every)
            for script in scripts
        }
        self._by_slot: list[I32] = [np.empty(0, np.int32)] * max_num_seqs

    def add(self, request: NewRequest) -> None:
        prompt = i32(request.token_ids)[: request.num_prompt_tokens].tobytes()
        self._by_slot[request.slot] = self._outputs.get(prompt, np.empty(0, np.int32))

    def remove(self, slot: int, output: I32) -> None:
        pass

    def propose(self, slots: I32, limits: I64, states: RequestStates) -> Drafts:
        num_outputs = states.num_known[slots] - states.num_prompt[slots]
        rows = zip(slots.tolist(), num_outputs.tolist(), limits.tolist(), strict=True)
        drafts = [self._by_slot[slot][known : known + limit] for slot, known, limit in rows]
        counts = np.array([len(row) for row in drafts], np.int64)
        return Drafts(counts, np.concatenate([np.empty(0, np.int32), *drafts]))


def _spoilt(output: list[int], wrong_every: int) -> I32:
    tokens = np.array(output, np.int32)
    if wrong_every:
        tokens[::wrong_every] = np.where(tokens[::wrong_every] > 0, tokens[::wrong_every] - 1, 1)
    return tokens
