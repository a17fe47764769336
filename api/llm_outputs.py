"""What the methods of ``LLM`` return for generated text."""

from __future__ import annotations

from dataclasses import dataclass, field

from api.engine.channel import Delta
from api.engine.request_stats import RequestStateStats
from api.generation.fanout import best_places
from api.model.tokenizer import Tokenizer
from api.params.sampling import SamplingParams
from engine_core.messages import TokenLogprobs, f32, i32


@dataclass
class Logprob:
    """The log probability of a token at one position."""

    logprob: float
    rank: int | None
    """1 is the most likely token."""
    decoded_token: str


@dataclass
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """``stop``, ``length``, ``repetition`` or ``error``."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it."""


@dataclass
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestStateStats = field(default_factory=RequestStateStats, compare=False)
    """Timestamps of the request."""


@dataclass
class BeamSearchSequence:
    """One of the best sequences of a search."""

    tokens: list[int]
    """Prompt and output."""
    logprobs: list[dict[int, Logprob]]
    """One entry per output token; empty unless requested."""
    cum_logprob: float
    text: str
    """Prompt and output."""
    finish_reason: str
    """``stop`` or ``length``."""
    stop_reason: int | None
    """The token id that ended it."""


@dataclass
class BeamSearchOutput:
    """The best sequences of a prompt, best first."""

    sequences: list[BeamSearchSequence]


class Folder:
    """Folds the deltas of one completion into its output."""

    def __init__(
        self, tokenizer: Tokenizer, result: RequestOutput, output: CompletionOutput, params: SamplingParams
    ) -> None:
        self._tokenizer = tokenizer
        self._result = result
        self.output = output
        if params.logprobs is not None or params.num_completions > params.n:
            output.logprobs, output.cumulative_logprob = [], 0.0
        if params.prompt_logprobs is not None and output.index == 0:
            result.prompt_logprobs = [None]

    @property
    def num_new_prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 for all but its first completion, so that a prompt is counted once."""
        return 0 if self.output.index else len(self._result.prompt_token_ids)

    def add(self, delta: Delta) -> None:
        output = self.output
        output.text += delta.text
        output.token_ids += delta.token_ids
        for entry in delta.logprobs:
            if output.logprobs is not None and output.cumulative_logprob is not None:
                position = describe_position(self._tokenizer, entry)
                output.logprobs.append(position)
                output.cumulative_logprob += position[int(i32(entry.token_ids)[0])].logprob
        if self._result.prompt_logprobs is not None and output.index == 0:
            self._result.prompt_logprobs += [
                describe_position(self._tokenizer, entry) for entry in delta.prompt_logprobs
            ]
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            if delta.error is not None:
                output.stop_reason = delta.error


def describe_position(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[int, Logprob]:
    """The log probabilities at one position, by token id. The position's own token comes first."""
    ids, values = i32(entry.token_ids).tolist(), f32(entry.logprobs).tolist()
    ranks = [entry.rank, *range(1, len(ids))]
    position: dict[int, Logprob] = {}
    for token_id, value, rank in zip(ids, values, ranks, strict=True):
        if token_id not in position:
            position[token_id] = Logprob(value, rank, tokenizer.decode([token_id], False))
    return position


def keep_best(result: RequestOutput, params: SamplingParams) -> None:
    """Keeps the ``n`` completions with the highest cumulative log probability, best first."""
    totals = [output.cumulative_logprob or 0.0 for output in result.outputs]
    result.outputs = [result.outputs[place] for place in best_places(totals, params.n)]
    for index, output in enumerate(result.outputs):
        output.index = index
        if params.logprobs is None:
            output.logprobs = None
