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
I64 = npt.NDArray[np.int64]

EXIT_MODEL = 78
"""Exit code when the model or its configuration is at fault (EX_CONFIG): starting again does not help."""


class Message(msgspec.Struct, tag=True, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """Base of everything that crosses a process border."""


class Tensor(Message, frozen=True):
    """A tensor within a message. Copying its bytes costs less than a frame of its own would."""

    dtype: str
    """As numpy names it."""
    shape: tuple[int, ...]
    """Empty for a single number."""
    data: bytes
    """Row-major, little-endian."""


# ---------------------------------------------------------------------------------------------------------
# What a request carries


class RepetitionDetection(Message, frozen=True):
    """When an output counts as caught in a loop: its end is one pattern ``min_count`` times in a row."""

    max_pattern_size: int
    """Tokens of the longest pattern that is looked for."""
    min_pattern_size: int = 1
    """Tokens of the shortest."""
    min_count: int = 2
    """Times that the pattern must occur one after another, at least 2."""


class ThinkingBudget(Message, frozen=True):
    """When thinking has to end: its end marker is forced, token by token."""

    max_tokens: int
    """Tokens that may stand between the markers."""
    start_token_ids: tuple[int, ...]
    """The marker that begins the thought."""
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
    """Sample from the most likely tokens whose probabilities add up to this; 1: off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0: off."""
    seed: int = 0
    """Key of the counter-based random numbers, 0 <= seed < 2**64."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output holds, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence of the token in the output, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt and output, multiplies negative ones; 1: off."""
    max_tokens: int = 16
    """Output tokens after which the request ends with ``FinishReason.LENGTH``."""
    min_tokens: int = 0
    """Output tokens before which no end or stop token is sampled."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request and are reported as its stop reason."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end the request silently; empty with ``ignore_eos``."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit), each id at most once."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be sampled; None: all."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the output must not hold."""
    logprobs: int | None = None
    """Number of most likely tokens to report beside the sampled one; -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    """As ``logprobs``, for each prompt token but the first; None: none at all."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens whose log probabilities are reported beside the ``logprobs`` most likely ones."""
    repetition_detection: RepetitionDetection | None = None
    """Ends an output that is caught in a loop; None: off."""
    thinking_budget: ThinkingBudget | None = None
    """Bounds the thought of a request without a grammar; None: no bound."""

    @property
    def all_stop_token_ids(self) -> tuple[int, ...]:
        return self.stop_token_ids + self.eos_token_ids

    @property
    def needs_all_positions(self) -> bool:
        """Whether logits of every prompt position are wanted, so that no prompt token may come from the cache."""
        return self.prompt_logprobs is not None


class ResolvedPoolingParams(Message, frozen=True):
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
    """The adapter that a request is computed with."""

    name: str
    """What clients call it."""
    lora_id: int
    """Number of the adapter, at least 1: 0 stands for the base model."""
    path: str
    """Folder of its weights."""
    content_hash: str
    """SHA-256 of its files: K and V that were computed with it are found by this, as its name may pass to another."""


class MultiModalFeature(Message, frozen=True):
    """One image or sound of a prompt, already processed."""

    identifier: str
    """Hash of the content: equal inputs are encoded once and share cached blocks."""
    offset: int
    """Index in the prompt of its first placeholder token."""
    length: int
    """Number of its placeholder tokens."""
    data: tuple[tuple[str, Tensor], ...] = ()
    """Inputs of the encoder by name."""


# ---------------------------------------------------------------------------------------------------------
# engine core -> workers


class NewRequest(Message, frozen=True):
    """A request enters a slot: new, or back after a preemption or a restart."""

    slot: int
    """Row of the worker's tables that the request holds until it is in ``finished_slots``."""
    token_ids: bytes
    """int32 [num_tokens]: the prompt, then what was generated so far."""
    num_prompt_tokens: int
    """How many of ``token_ids`` are the prompt."""
    num_computed_tokens: int
    """Tokens whose K and V already lie in the blocks (prefix cache hit)."""
    block_ids: tuple[bytes, ...]
    """One int32 [num_blocks] per KV cache group."""
    block_offsets: tuple[int, ...] = ()
    """Per KV cache group: where in the request's block table ``block_ids`` begins. What comes before lies behind the
    group's window and has no blocks. Empty: at the start in every group."""
    params: ResolvedParams | None = None
    """Of a request that generates."""
    pooling_params: ResolvedPoolingParams | None = None
    """Of a request that is pooled."""
    lora_id: int = 0
    """0: no adapter."""
    mm_features: tuple[MultiModalFeature, ...] = ()
    """Images and sounds of the prompt, in its order."""


class SchedulerOutput(Message, frozen=True):
    """The plan of one step. Workers execute plans strictly in the order of ``step_id``."""

    step_id: int
    """Number of the step, one more than that of the plan before."""
    slots: bytes
    """int32 [num_rows]: the requests of the step, in the order of the rows."""
    num_scheduled_tokens: bytes
    """int32 [num_rows], >= 1 each: tokens to compute, ``num_draft_tokens`` included."""
    num_sampled: bytes
    """uint8 [num_rows]: 1 if the row samples, 0 while its prompt is unfinished."""
    finished_slots: bytes = b""
    """int32: slots that are free again. Applied before ``new_reqs``."""
    new_reqs: tuple[NewRequest, ...] = ()
    """Requests that enter slots in this step."""
    block_updates: tuple[bytes, ...] = ()
    """One int32 [k, 3] per KV cache group: (slot, index in its block table, block id)."""
    num_draft_tokens: bytes = b""
    """uint8 [num_rows]: drafts that the worker may verify in the row, of those that it has. Empty: none in any row."""
    grammar_slots: bytes = b""
    """int32: slots whose sampling waits for this step's ``GrammarMask``."""


class GrammarMask(Message, frozen=True):
    """Allowed tokens of one step's constrained rows."""

    step_id: int
    """The step whose sampling waits for it."""
    bitmask: bytes
    """int32 [num_masks, ceil(vocab_size / 32)], bit set: allowed. In the order of ``grammar_slots``."""
    num_positions: bytes = b""
    """uint8 [constrained rows]: positions of each row that have a mask, from its first one on. The others come after a
    draft that is forbidden, so that nothing is sampled there that counts. Empty: one of each."""


class InitKVCache(Message, frozen=True):
    """The engine core's decisions; the worker allocates what they need and captures its programs."""

    num_blocks: tuple[int, ...]
    """Blocks of each KV cache group."""
    max_num_seqs: int
    """Slots: requests that run at the same time."""
    max_num_batched_tokens: int
    """Most tokens of a step."""
    max_model_len: int
    """Longest sequence that is served, prompt and output together."""


class WorkerShutdown(Message, frozen=True):
    """The worker ends at once; plans that still wait in it are not computed."""


ToWorker = SchedulerOutput | GrammarMask | InitKVCache | WorkerShutdown


# ---------------------------------------------------------------------------------------------------------
# workers -> engine core


class KVCacheGroupSpec(Message, frozen=True):
    """Layers whose KV caches share block tables."""

    kind: str
    """full, sliding_window, mla or draft."""
    block_size: int
    """Tokens in a block."""
    bytes_per_block: int
    """Of all layers of the group together, on this rank."""
    layers: tuple[int, ...]
    """Indices of the model's layers."""
    sliding_window: int | None = None
    """Tokens that a token of these layers attends to, itself included; None: all."""
    dtype: str = ""
    """Type of what is cached, as torch names it."""
    layout: str = ""
    """How it lies in a block: what one layout wrote no other can read."""


class LoadProgress(Message, frozen=True):
    """How far a worker is with something that takes long."""

    rank: int
    """Of the worker that says so."""
    stage: str
    """What it is doing, for people."""
    done: int
    """How much of ``total``; the unit is the stage's."""
    total: int
    """All that there is to do."""


class WorkerReady(Message, frozen=True):
    """The weights are loaded; the worker knows what it needs for the KV cache."""

    rank: int
    """Of the worker that says so."""
    free_bytes: int
    """Device memory that is available now."""
    total_bytes: int
    """All memory of the device."""
    weight_bytes: int
    """Device memory of the weights."""
    default_kv_bytes: int
    """Size of the KV cache that the device advises when nothing is configured."""
    kv_cache_groups: tuple[KVCacheGroupSpec, ...]
    """What the model's layers need, one group per kind of cache."""
    max_model_len: int
    """What the model was made for."""
    vocab_size: int
    """Width of the logits."""
    dtype: str = ""
    """Of weights and activations, as torch names it."""
    device: str = ""
    """Its name among the devices, such as cpu."""
    architecture: str = ""
    """As config.json names it."""
    hidden_size: int = 0
    """Width of the hidden states. 0: they cannot be pooled."""
    step_bytes: int = 0
    """What the largest step needs beside weights and KV cache: values of the model, logits, the sampler's tables."""
    position_bytes: int = 0
    """Likewise for each token of the longest sequence: tokens, block tables, rotations."""


class KVCacheReady(Message, frozen=True):
    """The KV cache is allocated and programs are captured; plans may come."""

    rank: int
    """Of the worker that says so."""
    capture_ms: float = 0.0
    """Milliseconds that allocating and capturing took."""


class TokenLogprobs(Message, frozen=True):
    """Log probabilities at one position, of the unprocessed logits."""

    row: int
    """Row of the step."""
    position: int
    """For prompt logprobs the token's index in the prompt, else which of the row's tokens of this step it is."""
    token_ids: bytes
    """int32 [1 + k]: the token itself, then the k most likely ones."""
    logprobs: bytes
    """float32 [1 + k]."""
    rank: int
    """Rank of the token in the whole vocabulary, 1 = most likely."""


class RowError(Message, frozen=True):
    """A row whose result is not usable; the step's other rows are unharmed."""

    row: int
    """Row of the step."""
    message: str
    """For the client."""
    is_request_fault: bool = False
    """What the request asks for is to blame, not the model."""
    position: int = 0
    """Which of the row's tokens of this step it stands for."""


class ModelRunnerOutput(Message, frozen=True):
    """The result of one step."""

    step_id: int
    """The plan that it answers."""
    rank: int = 0
    """Whose it is: every answer of a worker says so."""
    sampled_token_ids: bytes = b""
    """int32: the tokens of the rows that sample, one row after another: the drafts that hold, and one more. That one is
    0 in a row with an error, which ends there."""
    num_accepted: bytes = b""
    """uint8 [rows that sample]: drafts that hold. Empty: none of any row."""
    num_draft_tokens: bytes = b""
    """uint8 [rows that sample]: drafts that the worker has for the next step of each. Empty: none."""
    draft_token_ids: bytes = b""
    """int32: these drafts, one row after another. Masks of a grammar depend on them."""
    row_errors: tuple[RowError, ...] = ()
    """At most one for a row."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of sampled tokens, for rows that asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the step's prompt tokens, for rows that asked for them."""
    pooler_output: tuple[tuple[int, Tensor], ...] = ()
    """Rows whose prompt is complete: row of the step, and float32 [size], or [num_prompt_tokens, size] for ALL."""
    forward_ms: float = 0.0
    """Milliseconds that the worker spent on the step."""


class Heartbeat(Message, frozen=True):
    """A rank whose results nobody needs has computed a step: it lives, and nothing is owed by it up to here."""

    rank: int
    """Whose it is."""
    step_id: int
    """The plan's."""


class WorkerFailed(Message, frozen=True):
    """A worker cannot go on. With ``exit_code`` 78 the model or its configuration is at fault: no restart helps."""

    rank: int
    """Of the worker that says so."""
    message: str
    """For people, in one line where it can be."""
    exit_code: int = 1
    """What the worker's process ends with."""
    traceback: str = ""
    """Empty where the message says it all."""


FromWorker = WorkerReady | LoadProgress | KVCacheReady | ModelRunnerOutput | Heartbeat | WorkerFailed


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
