"""The contract the engine core accepts from the api, and what it answers.

Requests are known by ``index``, a number that the api never uses twice; ``request_id`` is for people.
See ``executor/messages.py`` for how columns are encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from engine_core.restart import Suspicion
from executor.messages import (
    EXIT_MODEL,
    I32,
    POOLING_TYPES,
    LoadProgress,
    LoRARequest,
    Message,
    MultiModalFeature,
    RepetitionDetection,
    ResolvedParams,
    ResolvedPoolingParams,
    Tensor,
    ThinkingBudget,
    TokenLogprobs,
    i32,
    to_array,
    to_tensor,
    u8,
)

__all__ = [
    "EXIT_MODEL",
    "I32",
    "POOLING_TYPES",
    "AbortRequests",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "EngineDead",
    "EngineReady",
    "FinishReason",
    "FromEngineCore",
    "GrammarSpec",
    "LoRARequest",
    "LoadProgress",
    "Message",
    "MultiModalFeature",
    "Ping",
    "ResolvedPoolingParams",
    "RepetitionDetection",
    "ResetPrefixCache",
    "ResolvedParams",
    "SchedulerStats",
    "SetVocabulary",
    "Shutdown",
    "SiblingRequests",
    "StatusRequest",
    "Suspicion",
    "Tensor",
    "ThinkingBudget",
    "Thought",
    "ToEngineCore",
    "TokenLogprobs",
    "UtilityOutput",
    "WorkersLost",
    "WorkersRestarted",
    "f32",
    "i32",
    "i64",
    "to_array",
    "to_tensor",
    "u8",
]


class FinishReason(IntEnum):
    """Why a request ended."""

    STOP = 0
    """A stop string or token, an end token, or a grammar that is complete."""
    LENGTH = 1
    """``max_tokens`` or the context is used up."""
    ABORT = 2
    """The client went away, or the server is shutting down."""
    ERROR = 3
    """``EngineCoreOutput.error`` says what went wrong."""
    REPETITION = 4
    """The output is caught in a loop, see ``RepetitionDetection``."""


# ---------------------------------------------------------------------------------------------------------
# api -> engine core


class Thought(Message, frozen=True):
    """What may stand in an output before the part that must be in a language."""

    end: bytes
    """The text that ends it."""
    end_token_ids: tuple[int, ...]
    """That text in tokens, for when it has to end."""
    start_token_ids: tuple[int, ...] = ()
    """What begins it."""
    is_open: bool = False
    """The output begins inside of it, not with ``start_token_ids`` or the language."""
    max_tokens: int | None = None
    """Tokens that it may have before its end is forced."""


class GrammarSpec(Message, frozen=True):
    """The language that an output must be in."""

    kind: str
    """json, regex, choice or grammar."""
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, or a grammar in Lark's notation or GBNF."""
    disable_any_whitespace: bool = False
    """JSON without white space between its parts."""
    whitespace_pattern: str | None = None
    """Regular expression of the white space between parts of JSON."""
    param: str = "structured_outputs"
    """The field of the client's request, for errors."""
    thought: Thought | None = None
    """What may come before; None: the first token is in the language."""

    @property
    def completes(self) -> bool:
        """Whether an output must be complete when the request's tokens run out."""
        return self.kind == "json"


class SetVocabulary(Message, frozen=True):
    """The tokens that grammars are about. Sent once to an engine core, no later than the first request that has a
    grammar."""

    tokens: tuple[bytes, ...]
    """By token id; empty: it stands for no text."""
    special_token_ids: tuple[int, ...]
    """They stand for no text either, whatever their bytes are."""
    end_token_ids: tuple[int, ...]
    """Tokens with which a model ends its output."""


class EngineCoreRequest(Message, frozen=True):
    """A request to compute. It is answered in ``EngineCoreOutputs`` until one has a ``finish_reason``."""

    request_id: str
    """For logs and metrics; two requests may share one."""
    index: int
    """The number that all other messages know it by."""
    prompt_token_ids: bytes
    """int32 [num_prompt_tokens], at least one."""
    sampling_params: ResolvedParams | None = None
    """Of a request that generates."""
    pooling_params: ResolvedPoolingParams | None = None
    """Of a request that is pooled instead. Exactly one of the two is given."""
    arrival_time: float = 0.0
    """CLOCK_MONOTONIC seconds, comparable between processes of one machine."""
    priority: int = 0
    """Lower runs first under the priority policy."""
    tenant: tuple[str, str] = ("", "")
    """Who it is served to: a short name of the API key and one of its user. Tenants take turns."""
    lora_request: LoRARequest | None = None
    """The adapter to compute it with; None: the base model."""
    mm_features: tuple[MultiModalFeature, ...] = ()
    """Images and sounds of the prompt, in its order."""
    cache_salt: str = ""
    """Prompts of different salts never share cached blocks."""
    resumed_output_token_ids: bytes = b""
    """int32: tokens generated in an earlier life of the request; numbering goes on after them."""
    suspicion: Suspicion | None = None
    """Deaths of engine cores that point at it. Requests that have to run alone are sent before all others."""
    grammar: GrammarSpec | None = None
    """The language of the output; None: any text."""


class SiblingRequests(Message, frozen=True):
    """Completions of one prompt: they are ``first`` but for name, index and seed, and share all the rest."""

    first: EngineCoreRequest
    """One that generates and has no output yet."""
    request_ids: tuple[str, ...]
    """One for each request."""
    indices: bytes
    """int64 [n]"""
    seeds: tuple[int, ...]
    """One for each request."""

    def requests(self) -> Iterator[EngineCoreRequest]:
        """Each of them by itself."""
        params = self.first.sampling_params or ResolvedParams(max_tokens=1)
        for request_id, index, seed in zip(self.request_ids, i64(self.indices).tolist(), self.seeds, strict=True):
            own = msgspec.structs.replace(params, seed=seed)
            yield msgspec.structs.replace(self.first, request_id=request_id, index=index, sampling_params=own)


class AbortRequests(Message, frozen=True):
    """Ends requests whose clients are gone."""

    indices: tuple[int, ...]
    """Requests to end without another word; unknown ones are ignored."""


class Ping(Message, frozen=True):
    """Asks whether the loop still turns; answered with an empty ``UtilityOutput``."""

    call_id: int
    """Comes back in the answer."""


class ResetPrefixCache(Message, frozen=True):
    """Forgets all cached blocks; answered with a ``UtilityOutput``."""

    call_id: int
    """Comes back in the answer."""


class StatusRequest(Message, frozen=True):
    """Asks for counts that tests and operators look at (free blocks, slots, queues, integrity)."""

    call_id: int
    """Comes back in the answer."""


class Shutdown(Message, frozen=True):
    """Ends the engine core and its workers."""

    drain: bool = False
    """Let running requests finish first."""


ToEngineCore = (
    EngineCoreRequest
    | SiblingRequests
    | SetVocabulary
    | AbortRequests
    | Ping
    | ResetPrefixCache
    | StatusRequest
    | Shutdown
)


# ---------------------------------------------------------------------------------------------------------
# engine core -> api


class EngineReady(Message, frozen=True):
    """The model is loaded; requests are computed from now on."""

    engine_epoch: int
    """Number of this engine core, counted over restarts."""
    pid: int
    """Of the engine core."""
    max_model_len: int
    """Longest sequence that is served, prompt and output together."""
    vocab_size: int
    """Width of the logits."""
    num_kv_blocks: int
    """Of the prefix cache and running requests together, in the largest KV cache group; 0: there is no cache."""
    block_size: int
    """Tokens in a block."""
    kv_cache_bytes: int
    """Device memory of all blocks."""
    weight_bytes: int
    """Device memory of the weights."""
    max_num_seqs: int
    """Requests that run at the same time."""
    dtype: str = ""
    """Of weights and activations, as torch names it."""
    device: str = ""
    """Its name among the devices, such as cpu."""
    architecture: str = ""
    """As config.json names it."""
    worker_pids: tuple[int, ...] = ()
    """By rank; none without processes of their own."""
    hidden_size: int = 0
    """Width of pooled vectors. 0: the engine cannot pool."""


class SchedulerStats(Message, frozen=True):
    """The state of the scheduler, for metrics."""

    num_running_reqs: int = 0
    """Requests that hold a slot."""
    num_waiting_reqs: int = 0
    """Requests that wait for one."""
    num_deferred_reqs: int = 0
    """Of these, requests that wait for something of their own, not for room: their grammar is being compiled."""
    kv_cache_usage: float = 0.0
    """Share of blocks in use in the fullest KV cache group, 0 to 1; blocks that are only cached count as free."""
    prefix_cache_queries: int = 0
    """Tokens looked up since start."""
    prefix_cache_hits: int = 0
    """Tokens found since start."""
    num_preemptions: int = 0
    """Requests that had to start over for lack of blocks, since start."""
    num_scheduled_tokens: int = 0
    """Of this step."""
    schedule_us: float = 0.0
    """Microseconds that planning the step took."""
    forward_ms: float = 0.0
    """Milliseconds that the worker spent on it."""


class EngineCoreOutput(Message, frozen=True):
    """A row that has more to say than its next tokens."""

    index: int
    """The request."""
    first_output_index: int
    """Number of output tokens before ``new_token_ids``."""
    new_token_ids: tuple[int, ...] = ()
    """Tokens of this step, in their order; the end or stop token included."""
    finish_reason: int | None = None
    """A ``FinishReason``."""
    stop_reason: int | None = None
    """The stop token id that ended the request, if one of ``stop_token_ids`` did."""
    ends_with_stop_token: bool = False
    """The last of ``new_token_ids`` is the end token or stop token that ended the output, which is not part of the
    text."""
    new_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of ``new_token_ids``, if the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of prompt tokens that this step computed, if the request asked for them."""
    pooling_output: Tensor | None = None
    """The result of a pooling request, which ends with it."""
    num_cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache; sent once."""
    scheduled_time: float | None = None
    """When the request first ran (CLOCK_MONOTONIC seconds); sent once."""
    error: str | None = None
    """What went wrong, for the client; the request has ended."""
    error_param: str | None = None
    """The error is the client's fault: the field that is to blame, or an empty text if it is none in particular."""
    is_culprit: bool = False
    """The request killed workers, again and again; it must not come back soon."""


MAX_OUTPUTS = 64
"""Rows of a message that have more to say than their token: each costs the api about a tenth of a millisecond."""


class EngineCoreOutputs(Message, frozen=True):
    """All that one step brought. Rows that only got tokens are columns."""

    engine_epoch: int
    """Number of the engine core that sends it."""
    indices: bytes = b""
    """int64 [n]: requests."""
    output_indices: bytes = b""
    """int32 [n]: index of each row's first token in the request's output."""
    token_ids: bytes = b""
    """int32 [all tokens]: one row after another."""
    outputs: tuple[EngineCoreOutput, ...] = ()
    """Rows that have more to say, see ``EngineCoreOutput``."""
    scheduler_stats: SchedulerStats | None = None
    """Counts after the step; not in every message."""
    timestamp: float = 0.0
    """CLOCK_MONOTONIC seconds."""
    num_tokens: bytes = b""
    """uint8 [n]: tokens of each row of the columns. Empty: one of each."""

    def pieces(self) -> Iterator[EngineCoreOutputs]:
        """The same in messages of at most ``MAX_OUTPUTS`` outputs, so that none takes the api long.

        The columns and the statistics are in the last one.
        """
        outputs = self.outputs
        last = max(0, len(outputs) - 1) // MAX_OUTPUTS * MAX_OUTPUTS
        for begin in range(0, last, MAX_OUTPUTS):
            yield EngineCoreOutputs(
                engine_epoch=self.engine_epoch,
                outputs=outputs[begin : begin + MAX_OUTPUTS],
                timestamp=self.timestamp,
            )
        yield msgspec.structs.replace(self, outputs=outputs[last:]) if last else self


class UtilityOutput(Message, frozen=True):
    """The answer to a message with a ``call_id``."""

    call_id: int
    """The call that it answers."""
    result: dict[str, int | float | str | bool] = {}
    """Names and values, as the call defines them."""
    error: str | None = None
    """Why there is no result."""


class WorkersLost(Message, frozen=True):
    """Workers died or hung and are being started again; ``WorkersRestarted`` follows."""

    engine_epoch: int
    """Number of the engine core that sends it."""
    reason: str
    """For the log."""


class WorkersRestarted(Message, frozen=True):
    """Workers died and were started again; what ran was queued again. A pause, not an error."""

    engine_epoch: int
    """Number of the engine core that sends it."""
    worker_pids: tuple[int, ...]
    """By rank."""
    reason: str
    """Why they were started again, for the log."""


class EngineDead(Message, frozen=True):
    """The engine core gives up and ends; every open request ends with it."""

    engine_epoch: int
    """Number of the engine core that sends it."""
    message: str
    """For people, in one line where it can be."""
    exit_code: int = 1
    """What the process ends with; 78: the model or its configuration is at fault."""


FromEngineCore = (
    EngineReady | LoadProgress | EngineCoreOutputs | UtilityOutput | WorkersLost | WorkersRestarted | EngineDead
)


def f32(column: bytes) -> npt.NDArray[np.float32]:
    """A read-only view of a float32 column."""
    return np.frombuffer(column, dtype=np.float32)


def i64(column: bytes) -> npt.NDArray[np.int64]:
    """A read-only view of an int64 column."""
    return np.frombuffer(column, dtype=np.int64)
