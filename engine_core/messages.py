"""The protocol between api and engine core.

Requests are identified by ``index``, a number that the api never reuses; ``request_id`` is for humans. See
``executor/messages.py`` for how columns are encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from engine_core.restart import Suspicion
from engine_core.snapshots import Snapshots
from executor.messages import (
    EXIT_MODEL,
    I32,
    POOLING_TYPES,
    LoadProgress,
    LoRARequest,
    Message,
    ModelSurvey,
    MultiModalFeature,
    MultiModalSupport,
    PoolingSupport,
    RepetitionDetection,
    ResolvedParams,
    ResolvedPoolingParams,
    Tensor,
    ThinkingBudget,
    TokenLogprobs,
    i32,
    is_pooling_type,
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
    "EnsureAdapter",
    "FinishReason",
    "ForgetAdapter",
    "FromEngineCore",
    "GrammarSpec",
    "LoRARequest",
    "LoadProgress",
    "Message",
    "ModelSurvey",
    "MultiModalFeature",
    "MultiModalSupport",
    "Ping",
    "PoolingSupport",
    "ResolvedPoolingParams",
    "RepetitionDetection",
    "ResetPrefixCache",
    "ResolvedParams",
    "SchedulerStats",
    "ServingPlan",
    "SetVocabulary",
    "Shutdown",
    "SiblingRequests",
    "SleepRequest",
    "StatusRequest",
    "Suspicion",
    "Tensor",
    "ThinkingBudget",
    "Thought",
    "ToEngineCore",
    "TokenLogprobs",
    "UtilityOutput",
    "WakeUpRequest",
    "WorkersLost",
    "WorkersRestarted",
    "f32",
    "i32",
    "is_pooling_type",
    "i64",
    "to_array",
    "to_tensor",
    "u8",
]


class FinishReason(IntEnum):
    """Why a request ended."""

    STOP = 0
    """A stop string or token, an end token, or a complete grammar."""
    LENGTH = 1
    """``max_tokens`` or the context is used up."""
    ABORT = 2
    """The client disconnected, or the server is shutting down."""
    ERROR = 3
    """``EngineCoreOutput.error`` says what went wrong."""
    REPETITION = 4
    """The output is stuck in a loop; see ``RepetitionDetection``."""


# ---------------------------------------------------------------------------------------------------------
# api -> engine core


class Thought(Message, frozen=True):
    """Thinking that may precede the constrained part of an output."""

    end: bytes
    """Text that ends thinking."""
    end_token_ids: tuple[int, ...]
    """That text as tokens, to force the end of thinking."""
    start_token_ids: tuple[int, ...] = ()
    """Tokens that begin thinking."""
    is_open: bool = False
    """The output starts inside thinking, without ``start_token_ids``."""
    max_tokens: int | None = None
    """Tokens of thinking after which its end is forced."""


class GrammarSpec(Message, frozen=True):
    """The grammar that an output must match."""

    kind: str
    """json, regex, choice or grammar."""
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, or a grammar in Lark's notation or GBNF."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its parts."""
    whitespace_pattern: str | None = None
    """Regular expression of the whitespace between parts of JSON."""
    param: str = "structured_outputs"
    """Field of the client's request, for error messages."""
    thought: Thought | None = None
    """Thinking that may come first; None: the grammar applies from the first token on."""

    @property
    def completes(self) -> bool:
        """Whether an output must be complete when the request's tokens run out."""
        return self.kind == "json"


class SetVocabulary(Message, frozen=True):
    """The vocabulary for grammars. Sent once per engine core, before the first request with a grammar."""

    tokens: tuple[bytes, ...]
    """Bytes by token id; empty: the token has no text."""
    special_token_ids: tuple[int, ...]
    """Tokens without text, whatever their bytes."""
    end_token_ids: tuple[int, ...]
    """Tokens that end a model's output."""


class EngineCoreRequest(Message, frozen=True):
    """A request to compute. It is answered by ``EngineCoreOutputs`` until one has a ``finish_reason``."""

    request_id: str
    """For logs and metrics; two requests may share one."""
    index: int
    """The number that identifies it in all other messages."""
    prompt_token_ids: bytes
    """int32 [num_prompt_tokens], at least one."""
    sampling_params: ResolvedParams | None = None
    """Set for a request that generates."""
    pooling_params: ResolvedPoolingParams | None = None
    """Set for a pooling request. Exactly one of the two is given."""
    arrival_time: float = 0.0
    """CLOCK_MONOTONIC seconds, comparable across processes of one machine."""
    priority: int = 0
    """Lower runs first under the priority policy."""
    tenant: tuple[str, str] = ("", "")
    """Whom it is served for: short names of the API key and of its user. Tenants take turns."""
    lora_request: LoRARequest | None = None
    """The adapter to compute it with; None: the base model."""
    mm_features: tuple[MultiModalFeature, ...] = ()
    """Images and audio of the prompt, in prompt order."""
    cache_salt: str = ""
    """Prompts with different salts never share cached blocks."""
    resumed_output_token_ids: bytes = b""
    """int32: tokens generated in an earlier life of the request; output indices continue after them."""
    suspicion: Suspicion | None = None
    """Engine core deaths that implicate it. Requests that must run alone are sent before all others."""
    grammar: GrammarSpec | None = None
    """The grammar of the output; None: unconstrained."""


class SiblingRequests(Message, frozen=True):
    """Completions of one prompt: copies of ``first`` that differ only in name, index and seed."""

    first: EngineCoreRequest
    """A request that generates and has no output yet."""
    request_ids: tuple[str, ...]
    """One per request."""
    indices: bytes
    """int64 [n]"""
    seeds: tuple[int, ...]
    """One per request."""

    def requests(self) -> Iterator[EngineCoreRequest]:
        """Yields the individual requests."""
        params = self.first.sampling_params or ResolvedParams(max_tokens=1)
        for request_id, index, seed in zip(self.request_ids, i64(self.indices).tolist(), self.seeds, strict=True):
            own = msgspec.structs.replace(params, seed=seed)
            yield msgspec.structs.replace(self.first, request_id=request_id, index=index, sampling_params=own)


class AbortRequests(Message, frozen=True):
    """Ends requests whose clients have disconnected."""

    indices: tuple[int, ...]
    """Requests to end without an answer; unknown ones are ignored."""


class Ping(Message, frozen=True):
    """Checks that the loop is running; answered with an empty ``UtilityOutput``."""

    call_id: int
    """Returned in the answer."""


class ResetPrefixCache(Message, frozen=True):
    """Forgets all cached blocks; answered with a ``UtilityOutput``."""

    call_id: int
    """Returned in the answer."""


class SleepRequest(Message, frozen=True):
    """Stops computing and frees memory; answered with a ``UtilityOutput`` once that is done. Requests wait."""

    call_id: int
    """Returned in the answer."""
    level: int = 1
    """1: frees the KV cache. 2: frees the weights, too, by ending the workers."""
    keeps_kv: bool = False
    """The KV cache is kept, if its memory is the engine core's."""
    finishes: bool = False
    """Requests that have started are computed to their ends first."""


class WakeUpRequest(Message, frozen=True):
    """Ends sleep, with weights as they are on disk if they had been freed; answered with a ``UtilityOutput``."""

    call_id: int
    """Returned in the answer."""


class EnsureAdapter(Message, frozen=True):
    """Loads an adapter, or tries whether it could be loaded; answered with a ``UtilityOutput`` whose ``error`` says why
    it cannot be used."""

    call_id: int
    """Returned in the answer."""
    adapter: LoRARequest
    """The adapter."""


class ForgetAdapter(Message, frozen=True):
    """No later request has an adapter: its memory is freed once the present ones are done."""

    content_hash: str
    """Identifies the adapter."""


class StatusRequest(Message, frozen=True):
    """Asks for counts for tests and operators (free blocks, slots, queues, integrity)."""

    call_id: int
    """Returned in the answer."""


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
    | EnsureAdapter
    | ForgetAdapter
    | StatusRequest
    | SleepRequest
    | WakeUpRequest
    | Shutdown
)


# ---------------------------------------------------------------------------------------------------------
# engine core -> api


class EngineReady(Message, frozen=True):
    """The model is loaded; the engine computes requests."""

    engine_epoch: int
    """Number of this engine core, counted over restarts."""
    pid: int
    """Process id of the engine core."""
    max_model_len: int
    """Longest sequence served, prompt and output together."""
    vocab_size: int
    """Width of the logits."""
    num_kv_blocks: int
    """Blocks for prefix cache and running requests together, in the largest KV cache group; 0: no KV cache."""
    block_size: int
    """Tokens in a block."""
    max_num_seqs: int
    """Maximum number of requests running at the same time."""
    dtype: str = ""
    """torch's name of the dtype of weights and activations."""
    device: str = ""
    """Name of the device, such as cpu."""
    architecture: str = ""
    """Architecture, as named in config.json."""
    worker_pids: tuple[int, ...] = ()
    """Process ids by rank; empty if the workers have no separate processes."""
    hidden_size: int = 0
    """Size of pooled vectors. 0: the engine cannot pool."""
    kernels: str = ""
    """What computes, for people; engines with the same compute the same bits."""
    weight_bytes: int = 0
    """Memory of the weights, of all workers together."""
    kv_cache_dtype: str = ""
    """torch's names of the dtypes of the KV cache."""
    pooling: PoolingSupport = PoolingSupport()
    """What the model does with pooled hidden states."""
    multimodal: MultiModalSupport | None = None
    """What the model does with images; None: it takes none."""
    snapshots: Snapshots | None = None
    """Of a model with states, the prefixes that can be cached; None: all of whole blocks."""


class SchedulerStats(Message, frozen=True):
    """The state of the scheduler, for metrics."""

    num_running_reqs: int = 0
    """Requests that hold a slot."""
    num_waiting_reqs: int = 0
    """Requests waiting for a slot."""
    num_deferred_reqs: int = 0
    """Waiting requests that are not ready to run yet: their grammars are being compiled."""
    kv_cache_usage: float = 0.0
    """Fraction of blocks in use in the fullest KV cache group, 0 to 1; blocks that are only cached count as free."""
    prefix_cache_queries: int = 0
    """Tokens looked up since the start."""
    prefix_cache_hits: int = 0
    """Tokens found since the start."""
    external_prefix_cache_queries: int = 0
    """Tokens looked up in a store (``--kv-cache-dir``) since the start."""
    external_prefix_cache_hits: int = 0
    """Tokens to be loaded from it since the start."""
    num_preemptions: int = 0
    """Preemptions for lack of blocks since the start."""
    num_scheduled_tokens: int = 0
    """Tokens scheduled in this plan, by all of its steps."""
    schedule_us: float = 0.0
    """Microseconds that planning took."""
    forward_ms: float = 0.0
    """Milliseconds that the worker spent on the plan."""
    num_steps: int = 1
    """Steps of the plan: forward passes, one after another."""
    num_drafts: int = 0
    """Rows with drafts since the start."""
    num_draft_tokens: int = 0
    """Drafts verified since the start."""
    num_accepted_tokens: int = 0
    """Drafts accepted since the start."""
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    """The same, by position among a row's drafts, without the last positions that had none."""
    running_adapters: tuple[str, ...] = ()
    """Names of the adapters that requests run with."""
    waiting_adapters: tuple[str, ...] = ()
    """Names of those that requests wait for."""
    num_loaded_adapters: int = 0
    """Adapters in memory."""


class EngineCoreOutput(Message, frozen=True):
    """A row that reports more than its new tokens."""

    index: int
    """The request."""
    first_output_index: int
    """Number of output tokens before ``new_token_ids``."""
    new_token_ids: tuple[int, ...] = ()
    """New tokens of this step, in order, including an end or stop token."""
    finish_reason: int | None = None
    """A ``FinishReason``."""
    stop_reason: int | None = None
    """The stop token id that ended the request, if one of ``stop_token_ids`` did."""
    ends_with_stop_token: bool = False
    """The last of ``new_token_ids`` is the end or stop token that ended the output; it is not part of the text."""
    new_logprobs: tuple[TokenLogprobs, ...] = ()
    """Log probabilities of ``new_token_ids``, if requested."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Log probabilities of the prompt tokens computed in this step, if requested."""
    pooling_output: Tensor | None = None
    """The result of a pooling request, which ends the request."""
    num_cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache; sent once."""
    scheduled_time: float | None = None
    """When the request first ran (CLOCK_MONOTONIC seconds); sent once."""
    error: str | None = None
    """Error message for the client; the request has ended."""
    error_param: str | None = None
    """Set if the client is at fault: the field to blame, or an empty string if none in particular."""
    num_draft_tokens: int = 0
    """Drafts that were verified for the request."""
    num_accepted_tokens: int = 0
    """How many of ``new_token_ids`` are accepted drafts."""
    is_culprit: bool = False
    """The request killed workers repeatedly and must not be retried soon."""


MAX_OUTPUTS = 64
"""Maximum ``outputs`` per message: each costs the api about a tenth of a millisecond."""


class EngineCoreOutputs(Message, frozen=True):
    """All results of one step. Rows with only new tokens are sent as columns."""

    engine_epoch: int
    """Number of the sending engine core."""
    indices: bytes = b""
    """int64 [n]: requests."""
    output_indices: bytes = b""
    """int32 [n]: index of each row's first new token in the request's output."""
    token_ids: bytes = b""
    """int32 [all tokens], concatenated row by row."""
    outputs: tuple[EngineCoreOutput, ...] = ()
    """Rows that report more; see ``EngineCoreOutput``."""
    scheduler_stats: SchedulerStats | None = None
    """Statistics after the step; not in every message."""
    timestamp: float = 0.0
    """CLOCK_MONOTONIC seconds."""
    num_tokens: bytes = b""
    """uint8 [n]: tokens per row of the columns. Empty: one per row."""
    num_draft_tokens: bytes = b""
    """uint8 [n]: drafts that were verified in each row of the columns. Empty: none in any row."""
    num_accepted_tokens: bytes = b""
    """uint8 [n]: how many of its tokens are accepted drafts. Empty: none in any row."""

    def pieces(self) -> Iterator[EngineCoreOutputs]:
        """Splits into messages of at most ``MAX_OUTPUTS`` outputs, so that none blocks the api for long.

        Columns and statistics are in the last one.
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
    """The call being answered."""
    result: dict[str, int | float | str | bool] = {}
    """Values by name, as defined by the call."""
    error: str | None = None
    """Why there is no result."""


class WorkersLost(Message, frozen=True):
    """Workers died or hung and are being restarted; ``WorkersRestarted`` follows."""

    engine_epoch: int
    """Number of the sending engine core."""
    reason: str
    """For the log."""
    suspicions: dict[int, Suspicion] = {}
    """Requests that may be to blame, by index: an engine that takes one over must know."""


class WorkersRestarted(Message, frozen=True):
    """The workers were restarted and running requests were requeued. A pause, not an error."""

    engine_epoch: int
    """Number of the sending engine core."""
    worker_pids: tuple[int, ...]
    """Process ids by rank."""
    reason: str
    """Reason for the restart, for the log."""
    keeps_cache: bool = False
    """The prefix cache is what it was, up to the steps that were lost."""


class EngineDead(Message, frozen=True):
    """The engine core gives up and exits; every open request ends with it."""

    engine_epoch: int
    """Number of the sending engine core."""
    message: str
    """Human-readable message, one line if possible."""
    exit_code: int = 1
    """Exit code of the process; 78: the model or its configuration is at fault."""


class ServingPlan(Message, frozen=True):
    """What a configuration would take and give, found out without loading the model (``engine_core/plan.py``)."""

    surveys: tuple[ModelSurvey, ...]
    """What each worker of an engine would report."""
    num_kv_tokens: int = 0
    """Tokens in the KV cache of an engine; 0: it has none, or the model does not fit."""
    kv_cache_bytes: tuple[int, ...] = ()
    """Memory of that cache in each worker."""
    kv_bytes_per_token: float = 0.0
    """Memory of a token in it, in all workers together, while the sequence is shorter than windows."""
    max_model_len: int = 0
    """Longest sequence served."""
    problem: str = ""
    """Why the model does not fit; empty: it does."""
    change: str = ""
    """The smallest change of the flags with which it would fit; empty: none was found, or none is needed."""


# ---------------------------------------------------------------------------------------------------------

FromEngineCore = (
    EngineReady | LoadProgress | EngineCoreOutputs | UtilityOutput | WorkersLost | WorkersRestarted | EngineDead
)


def f32(column: bytes) -> npt.NDArray[np.float32]:
    """A read-only view of a float32 column."""
    return np.frombuffer(column, dtype=np.float32)


def i64(column: bytes) -> npt.NDArray[np.int64]:
    """A read-only view of an int64 column."""
    return np.frombuffer(column, dtype=np.int64)
