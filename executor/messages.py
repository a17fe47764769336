"""The contract a worker accepts: plans come in, results go out.

All messages are msgspec Structs encoded as msgpack arrays. Columns that hold a number per row travel as
the raw bytes of a little-endian numpy array; each field says which. What did not change since the last
step is not sent again.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]


class Message(msgspec.Struct, tag=True, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """Base of everything that crosses a process border."""


class Tensor(Message, frozen=True):
    """A tensor within a message. Copying its bytes costs less than a frame of its own would."""

    dtype: str
    """As numpy names it."""
    shape: tuple[int, ...]
    data: bytes
    """Row-major, little-endian."""


# ---------------------------------------------------------------------------------------------------------
# What a request carries


class RepetitionDetection(Message, frozen=True):
    """When an output counts as caught in a loop: its end is one pattern ``min_count`` times in a row."""

    max_pattern_size: int
    """Tokens of the longest pattern that is looked for."""
    min_pattern_size: int = 1
    min_count: int = 2


class ThinkingBudget(Message, frozen=True):
    """When thinking has to end: its end marker is forced, token by token."""

    max_tokens: int
    """Tokens that may stand between the markers."""
    start_token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    """At least one."""
    starts_open: bool = False
    """The output begins inside of thinking."""


class ResolvedParams(Message, frozen=True):
    """Sampling parameters of one request after the api resolved names, defaults and the seed.

    Only numbers and token ids are left: a worker and the scheduler need no tokenizer.
    """

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """Key of the counter-based random numbers, 0 <= seed < 2**64."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request and are reported as its stop reason."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end the request silently; empty with ``ignore_eos``."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    """Number of most likely tokens to report beside the sampled one; -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    repetition_detection: RepetitionDetection | None = None
    thinking_budget: ThinkingBudget | None = None

    @property
    def all_stop_token_ids(self) -> tuple[int, ...]:
        return self.stop_token_ids + self.eos_token_ids

    @property
    def needs_all_positions(self) -> bool:
        """Whether logits of every prompt position are wanted, so that no prompt token may come from the cache."""
        return self.prompt_logprobs is not None


class PoolingParams(Message, frozen=True):
    """What to make of the hidden states of a request that generates nothing."""

    pooling_type: str = "LAST"
    """One of ``POOLING_TYPES``."""
    normalize: bool = True
    """Scale each vector to length 1."""
    dimensions: int | None = None
    """Keep that many leading numbers of each vector (before it is scaled)."""

    @property
    def needs_all_positions(self) -> bool:
        """Whether hidden states of more than the last position are wanted, so that none may come from the cache."""
        return self.pooling_type != "LAST"


POOLING_TYPES = ("LAST", "MEAN", "CLS", "ALL")
"""The last position, the mean of all, the first, or a vector for each position."""


class LoRARequest(Message, frozen=True):
    name: str
    lora_id: int
    path: str


class MultiModalFeature(Message, frozen=True):
    """One image or sound of a prompt, already processed."""

    identifier: str
    offset: int
    length: int
    data: tuple[tuple[str, Tensor], ...] = ()


# ---------------------------------------------------------------------------------------------------------
# engine core -> workers


class NewRequest(Message, frozen=True):
    """A request enters a slot: new, or back after a preemption or a restart."""

    slot: int
    token_ids: bytes
    """int32 [num_tokens]: the prompt, then what was generated so far."""
    num_prompt_tokens: int
    num_computed_tokens: int
    """Tokens whose K and V already lie in the blocks (prefix cache hit)."""
    block_ids: tuple[bytes, ...]
    """One int32 [num_blocks] per KV cache group."""
    params: ResolvedParams | None = None
    pooling_params: PoolingParams | None = None
    lora_id: int = 0
    mm_features: tuple[MultiModalFeature, ...] = ()


class SchedulerOutput(Message, frozen=True):
    """The plan of one step. Workers execute plans strictly in the order of ``step_id``."""

    step_id: int
    slots: bytes
    """int32 [num_rows]: the requests of the step, in the order of the rows."""
    num_scheduled_tokens: bytes
    """int32 [num_rows], >= 1 each."""
    num_sampled: bytes
    """uint8 [num_rows]: tokens to sample for the row (0 while its prompt is unfinished)."""
    finished_slots: bytes = b""
    """int32: slots that are free again. Applied before ``new_reqs``."""
    new_reqs: tuple[NewRequest, ...] = ()
    block_updates: tuple[bytes, ...] = ()
    """One int32 [k, 3] per KV cache group: (slot, index in its block table, block id)."""
    num_draft_tokens: bytes = b""
    draft_token_ids: bytes = b""
    scheduled_encoder_inputs: tuple[tuple[int, int], ...] = ()
    freed_encoder_inputs: tuple[str, ...] = ()
    kv_transfers: tuple[tuple[int, int], ...] = ()
    grammar_slots: bytes = b""
    """int32: slots whose sampling waits for this step's ``GrammarMask``."""


class GrammarMask(Message, frozen=True):
    """Allowed tokens of one step's constrained rows."""

    step_id: int
    bitmask: bytes
    """int32 [num_sampled_positions, ceil(vocab_size / 32)], bit set: allowed. In the order of ``grammar_slots``."""


class InitKVCache(Message, frozen=True):
    """The engine core's decisions; the worker allocates what they need and captures its programs."""

    num_blocks: tuple[int, ...]
    """Blocks of each KV cache group."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class WorkerShutdown(Message, frozen=True):
    pass


ToWorker = SchedulerOutput | GrammarMask | InitKVCache | WorkerShutdown


# ---------------------------------------------------------------------------------------------------------
# workers -> engine core


class KVCacheGroupSpec(Message, frozen=True):
    """Layers whose KV caches share block tables."""

    kind: str
    """full, sliding_window, mla or draft."""
    block_size: int
    bytes_per_block: int
    """Of all layers of the group together, on this rank."""
    layers: tuple[int, ...]
    sliding_window: int | None = None


class LoadProgress(Message, frozen=True):
    """How far a worker is with something that takes long."""

    rank: int
    stage: str
    done: int
    total: int


class WorkerReady(Message, frozen=True):
    """The weights are loaded; the worker knows what it needs for the KV cache."""

    rank: int
    free_bytes: int
    """Device memory that is available now."""
    total_bytes: int
    weight_bytes: int
    default_kv_bytes: int
    """Size of the KV cache that the device advises when nothing is configured."""
    kv_cache_groups: tuple[KVCacheGroupSpec, ...]
    max_model_len: int
    """What the model was made for."""
    vocab_size: int
    """Width of the logits."""
    dtype: str = ""
    device: str = ""
    architecture: str = ""
    hidden_size: int = 0
    """Width of the hidden states. 0: they cannot be pooled."""


class KVCacheReady(Message, frozen=True):
    rank: int
    capture_ms: float = 0.0


class TokenLogprobs(Message, frozen=True):
    """Log probabilities at one position, of the unprocessed logits."""

    row: int
    """Row of the step."""
    position: int
    """Which of the row's positions: for prompt logprobs the token's index in the prompt, else 0."""
    token_ids: bytes
    """int32 [1 + k]: the token itself, then the k most likely ones."""
    logprobs: bytes
    """float32 [1 + k]."""
    rank: int
    """Rank of the token in the whole vocabulary, 1 = most likely."""


class RowError(Message, frozen=True):
    """A row whose result is not usable; the step's other rows are unharmed."""

    row: int
    message: str
    is_request_fault: bool = False
    """What the request asks for is to blame, not the model."""


class ModelRunnerOutput(Message, frozen=True):
    """The result of one step."""

    step_id: int
    rank: int = 0
    """Whose it is: every answer of a worker says so."""
    sampled_token_ids: bytes = b""
    """int32: the rows' sampled tokens one after another, ``num_sampled`` for each row."""
    num_accepted: bytes = b""
    """uint8 [num_rows] when drafts were verified: tokens of each row that hold. Empty: all."""
    draft_token_ids: bytes = b""
    row_errors: tuple[RowError, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooler_output: tuple[tuple[int, Tensor], ...] = ()
    """Rows whose prompt is complete: row of the step, and float32 [size], or [num_prompt_tokens, size] for ALL."""
    finished_transfers: tuple[int, ...] = ()
    forward_ms: float = 0.0


class WorkerFailed(Message, frozen=True):
    """A worker cannot go on. With ``exit_code`` 78 the model or its configuration is at fault: no restart helps."""

    rank: int
    message: str
    exit_code: int = 1
    traceback: str = ""


FromWorker = WorkerReady | LoadProgress | KVCacheReady | ModelRunnerOutput | WorkerFailed


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """The array as a part of a message."""
    return Tensor(array.dtype.str, array.shape, array.tobytes())


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A read-only view of a tensor of a message."""
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype)).reshape(tensor.shape)


def i32(column: bytes) -> I32:
    """A read-only view of an int32 column."""
    return np.frombuffer(column, dtype=np.int32)


def u8(column: bytes) -> npt.NDArray[np.uint8]:
    """A read-only view of a uint8 column."""
    return np.frombuffer(column, dtype=np.uint8)
