"""The protocol between engine core and workers: plans go in, results come out.

All messages are msgspec Structs encoded as msgpack arrays. Columns, with one number per row, travel as the raw bytes of
a little-endian numpy array of the dtype that the field states. Data that did not change since the last step is not sent
again.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from executor.config import VECTOR_POOLINGS

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

EXIT_MODEL = 78
"""Exit code when the model or its configuration is at fault (EX_CONFIG): a restart does not help."""


class Message(msgspec.Struct, tag=True, array_like=True, omit_defaults=True, gc=False, frozen=True):
    """Base of all messages between processes."""


class Tensor(Message, frozen=True, gc=True, weakref=True):
    """A tensor inside a message. Copying its bytes is cheaper than a separate frame."""

    dtype: str
    """numpy's name of the dtype."""
    shape: tuple[int, ...]
    """Empty for a scalar."""
    data: bytes
    """Row-major, little-endian."""


# ---------------------------------------------------------------------------------------------------------
# Parts of requests


class RepetitionDetection(Message, frozen=True):
    """When an output counts as stuck in a loop: it ends with one pattern repeated ``min_count`` times in a row."""

    max_pattern_size: int
    """Length of the longest pattern in tokens."""
    min_pattern_size: int = 1
    """Length of the shortest pattern in tokens."""
    min_count: int = 2
    """Required consecutive occurrences of the pattern, at least 2."""


class ThinkingBudget(Message, frozen=True):
    """Limits thinking: when the budget is used up, the end marker is forced, token by token."""

    max_tokens: int
    """Maximum tokens between the markers."""
    start_token_ids: tuple[int, ...]
    """Marker that begins thinking."""
    end_token_ids: tuple[int, ...]
    """Marker that ends thinking, at least one token."""
    starts_open: bool = False
    """The output starts inside thinking."""


class ResolvedParams(Message, frozen=True):
    """Sampling parameters of one request, after the api has resolved names, defaults and the seed.

    Only numbers and token ids remain, so that workers and scheduler need no tokenizer.
    """

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this; 1: off."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0: off."""
    seed: int = 0
    """Key of the counter-based random numbers, 0 <= seed < 2**64."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that occur in the output, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence of the token in the output, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output; 1: off."""
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
    """Token sequences that must not occur in the output."""
    logprobs: int | None = None
    """Number of most likely tokens to report besides the sampled one; -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    """Like ``logprobs``, for each prompt token but the first; None: none at all."""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens whose log probabilities are reported in addition to the ``logprobs`` most likely ones."""
    repetition_detection: RepetitionDetection | None = None
    """Ends an output that is stuck in a loop; None: off."""
    thinking_budget: ThinkingBudget | None = None
    """Limits the thinking of a request without a grammar; None: no limit."""
    num_speculative_tokens: int | None = None
    """Maximum drafts per step; None: the server's."""

    @property
    def all_stop_token_ids(self) -> tuple[int, ...]:
        return self.stop_token_ids + self.eos_token_ids

    @property
    def needs_all_positions(self) -> bool:
        """Whether logits of every prompt position are needed, so that no prompt token may come from the cache."""
        return self.prompt_logprobs is not None


class ResolvedPoolingParams(Message, frozen=True):
    """How to pool the hidden states of a request that generates no tokens."""

    pooling_type: str = "LAST"
    """One of ``POOLING_TYPES``, or several vectors behind each other: names of ``VECTOR_POOLINGS``, joined by a +."""
    normalize: bool = True
    """Scale each vector to length 1."""
    dimensions: int | None = None
    """Number of leading dimensions to keep of each vector, before scaling; None: all."""
    classifies: bool = False
    """The model's head turns what was pooled into scores of its labels. ``normalize`` then means its activation."""
    num_skipped: int = 0
    """Leading positions that are not pooled."""
    second_segment: int = 0
    """Position at which tokens of type 1 begin; 0: there are none."""
    num_attended: int = 0
    """Leading tokens to which all attend, of a model that needs whole prompts; the others attend to them without being
    attended to. 0: all."""

    @property
    def needs_all_positions(self) -> bool:
        """Whether hidden states beyond the last position are needed, so that no prompt token may come from the
        cache."""
        return self.pooling_type != "LAST"


POOLING_TYPES = (*VECTOR_POOLINGS, "ALL")
"""A vector, or one per position."""


def is_pooling_type(name: str) -> bool:
    """Whether hidden states can be pooled like that; see ``ResolvedPoolingParams.pooling_type``."""
    return name in POOLING_TYPES or all(part in VECTOR_POOLINGS for part in name.split("+"))


class LoRARequest(Message, frozen=True):
    """The adapter that a request is computed with."""

    name: str
    """The name that clients use."""
    lora_id: int
    """Id that the client chose, at least 1."""
    path: str
    """Folder with the adapter's weights."""
    content_hash: str
    """SHA-256 of the adapter's files, followed by the scale if it is not 1. Identifies cached K and V, since the name
    may be reassigned."""
    scale: float = 1.0
    """Factor of what the adapter adds."""


class MultiModalFeature(Message, frozen=True):
    """One preprocessed image or audio input of a prompt, or a part of it that is encoded by itself."""

    identifier: str
    """Hash of the content: equal inputs are encoded once and share cached blocks."""
    offset: int
    """Index of its first token in the prompt."""
    length: int
    """Number of its tokens: placeholders (``MultiModalSupport.image_token_id``), and others between them."""
    num_embeds: int = 0
    """How many of them are placeholders."""
    num_patches: int = 0
    """Rows that its encoder computes."""
    axes: tuple[int, ...] = ()
    """Time, height and width in patches, where positions have three axes."""
    data: tuple[tuple[str, Tensor], ...] = ()
    """Encoder inputs by name. Empty in a ``NewRequest`` whose workers do not need them."""


# ---------------------------------------------------------------------------------------------------------
# engine core -> workers


class NewRequest(Message, frozen=True):
    """A request enters a slot: new, or back after a preemption or a restart."""

    slot: int
    """Row of the worker's tables that the request holds until the slot is in ``finished_slots``."""
    token_ids: bytes
    """int32 [num_tokens]: the prompt, then the output so far."""
    num_prompt_tokens: int
    """Number of prompt tokens in ``token_ids``."""
    num_computed_tokens: int
    """Tokens whose K and V are already in the blocks (prefix cache hit)."""
    block_ids: tuple[bytes, ...]
    """One int32 [num_blocks] per KV cache group."""
    block_offsets: tuple[int, ...] = ()
    """Per KV cache group: index in the request's block table at which ``block_ids`` begins. Earlier tokens are outside
    the group's window and have no blocks. Empty: 0 in every group."""
    params: ResolvedParams | None = None
    """Set for a request that generates."""
    pooling_params: ResolvedPoolingParams | None = None
    """Set for a pooling request."""
    lora_id: int = 0
    """Number of a loaded adapter (``LoadAdapter``); 0: none."""
    mm_features: tuple[MultiModalFeature, ...] = ()
    """Images and audio of the prompt, in prompt order."""
    draft_pool: int = 0
    """Requests with the same number may take drafts from each other's outputs."""


class ForcedDrafts(Message, frozen=True):
    """Tokens that a request's grammar forces, or nearly so: drafts that need no proposer."""

    slot: int
    """Slot of the request."""
    begin: int
    """Position of the first token in the sequence. Later ones continue the sequence even if the first ones have come
    in the meantime."""
    token_ids: bytes
    """int32 [tokens]."""

    def after(self, tokens: I32) -> I32:
        """The drafts that continue a sequence: int32 [drafts]; none if the sequence went another way.

        Args:
            tokens: int32 [known tokens].
        """
        drafts = i32(self.token_ids)
        count = len(tokens) - self.begin
        if count < 0 or not np.array_equal(tokens[self.begin :], drafts[:count]):
            return drafts[:0]
        return drafts[count:]


class SchedulerOutput(Message, frozen=True):
    """The plan of one step, or of several in a row (``num_steps``). Workers execute plans strictly in ``step_id``
    order."""

    step_id: int
    """Number of the plan; consecutive."""
    slots: bytes
    """int32 [num_rows]: slot of each row."""
    num_scheduled_tokens: bytes
    """int32 [num_rows], >= 1 each: tokens to compute, ``num_draft_tokens`` included."""
    num_sampled: bytes
    """uint8 [num_rows]: 1 if the row samples, 0 while its prompt is unfinished."""
    finished_slots: bytes = b""
    """int32: slots that became free. Applied before ``new_reqs``."""
    new_reqs: tuple[NewRequest, ...] = ()
    """Requests that enter slots in this step."""
    block_updates: tuple[bytes, ...] = ()
    """One int32 [k, 3] per KV cache group: (slot, index in its block table, block id)."""
    num_draft_tokens: bytes = b""
    """uint8 [num_rows]: maximum drafts that the worker may verify in the row. Empty: none in any row."""
    grammar_slots: bytes = b""
    """int32: slots whose sampling waits for this step's ``GrammarMask``."""
    forced_drafts: tuple[ForcedDrafts, ...] = ()
    """Drafts that take the place of the worker's own, for rows with ``num_draft_tokens``."""
    freed_features: tuple[str, ...] = ()
    """Identifiers of encoder outputs to drop, before any is computed."""
    encoder_inputs: tuple[tuple[int, int], ...] = ()
    """(slot, index in its ``mm_features``) of images to encode in this step, before the model runs."""
    num_steps: int = 1
    """Steps in a row, answered together. With more than one, all rows decode: each step computes a row's latest token
    and samples the next one. What changes about requests and blocks is applied once, before the first step."""


class GrammarMask(Message, frozen=True):
    """Allowed tokens of one step's constrained rows."""

    step_id: int
    """The step whose sampling waits for it."""
    bitmask: bytes
    """int32 [num_masks, ceil(vocab_size / 32)], a set bit allows the token. In the order of ``grammar_slots``."""
    num_positions: bytes = b""
    """uint8 [constrained rows]: leading positions of each row that have a mask. Later positions follow a forbidden
    draft, so their samples are discarded. Empty: one per row."""


class InitKVCache(Message, frozen=True):
    """The engine core's sizing decisions. The worker allocates its KV cache and tables accordingly and captures its
    program."""

    num_blocks: tuple[int, ...]
    """Blocks of each KV cache group."""
    max_model_len: int
    """Longest sequence served, prompt and output together."""
    kv_store: str = ""
    """Folder of the store that ``KVTransfer`` refers to; empty: there is none."""


HASH_BYTES = 32
"""Size of a block's hash."""


class KVTransfer(Message, frozen=True):
    """Blocks to move between the KV cache and a store. Begins once the plans before it are computed, and then goes on
    beside others; answered by ``FinishedTransfer``."""

    transfer_id: int
    """Returned in the answer."""
    is_load: bool
    """Fill the blocks from the store; else store them."""
    hashes: tuple[bytes, ...]
    """What each block holds: hashes of ``HASH_BYTES`` bytes."""
    groups: bytes
    """uint8 [blocks]: KV cache group of each."""
    block_ids: bytes
    """int32 [blocks]."""
    removed: tuple[str, ...] = ()
    """What to remove from the store first: names as in ``kv_transfer/disk.py``."""


class FreeKVCache(Message, frozen=True):
    """The worker gives the memory of its KV cache back to the system until plans write it again; answered by
    ``KVCacheFreed``. No plan is in flight, and nothing that is cached will be read."""


class LoadAdapter(Message, frozen=True):
    """The worker reads an adapter and answers with ``AdapterLoaded``. Steps planned before have no rows with its
    number."""

    number: int
    """Number of the adapter in plans, from 1 on; it takes the place of an earlier one. 0: it is only tried."""
    adapter: LoRARequest
    """Its files, and the hash that their content must have."""


class UnloadAdapter(Message, frozen=True):
    """The worker forgets an adapter. No later plan has rows with its number."""

    number: int
    """The adapter's number."""


class WorkerShutdown(Message, frozen=True):
    """The worker exits at once; pending plans are not computed."""


ToWorker = (
    SchedulerOutput
    | GrammarMask
    | InitKVCache
    | LoadAdapter
    | UnloadAdapter
    | KVTransfer
    | FreeKVCache
    | WorkerShutdown
)


# ---------------------------------------------------------------------------------------------------------
# workers -> engine core


class PoolingSupport(Message, frozen=True):
    """What a model does with pooled hidden states."""

    generates: bool = True
    """Whether it also generates text."""
    pooling_type: str = "LAST"
    """How vectors are pooled unless configured otherwise."""
    head_pooling: str = ""
    """What its classifier reads: one of ``POOLING_TYPES``; empty: it has no classifier."""
    labels: tuple[str, ...] = ()
    """Names of the classifier's outputs."""
    needs_whole_prompts: bool = False
    """A step computes whole prompts, as tokens attend to those after them."""
    token_size: int = 0
    """Size of the vectors of tokens; 0: that of pooled ones."""


STATES_LAYOUT = "states"
"""``KVCacheGroupSpec.layout`` of layers that keep a state per block, not entries per token."""
SNAPSHOT_TOKENS = 256
"""Tokens of a prompt between two states that are kept for others to go on from."""
OUTPUT_SNAPSHOT_TOKENS = 64
"""Tokens of an output between two such states. No step's drafts pass a multiple of it, so that the state is there."""


class MultiModalSupport(Message, frozen=True):
    """What a model does with images."""

    image_token_id: int
    """The token of a prompt whose embedding an image provides."""
    max_image_tokens: int
    """Most embeddings of one image."""
    cache_tokens: int
    """Embeddings that workers keep, of images that were encoded."""
    whole_images: bool = False
    """An image's tokens attend to each other, so one step must compute them all."""


class KVCacheGroupSpec(Message, frozen=True):
    """Layers whose KV caches share block tables."""

    kind: str
    """full, sliding_window, mla or draft."""
    block_size: int
    """Tokens in a block."""
    bytes_per_block: int
    """Bytes of one block in all layers of the group together, on this rank."""
    layers: tuple[int, ...]
    """Indices among the model's attention layers."""
    sliding_window: int | None = None
    """Tokens that a token of these layers attends to, itself included; None: all."""
    dtype: str = ""
    """torch's name of the cache's dtype."""
    layout: str = ""
    """Layout of a block. Caches of different layouts are incompatible."""


class LoadProgress(Message, frozen=True):
    """Progress of a worker's long-running stage."""

    rank: int
    """Rank of the sending worker."""
    stage: str
    """Human-readable name of the stage."""
    done: int
    """Amount done of ``total``, in the stage's unit."""
    total: int
    """Total amount of work."""


class WorkerReady(Message, frozen=True):
    """The weights are loaded; the worker reports what its KV cache needs."""

    rank: int
    """Rank of the sending worker."""
    free_bytes: int
    """Device memory available now."""
    total_bytes: int
    """Total device memory."""
    weight_bytes: int
    """Device memory of the weights."""
    default_kv_bytes: int
    """The device's default size of the KV cache."""
    kv_cache_groups: tuple[KVCacheGroupSpec, ...]
    """KV cache groups of the model, one per kind of cache."""
    max_model_len: int
    """Longest sequence that the model supports."""
    vocab_size: int
    """Width of the logits."""
    dtype: str = ""
    """torch's name of the dtype of weights and activations."""
    device: str = ""
    """Name of the device, such as cpu."""
    architecture: str = ""
    """Architecture, as named in config.json."""
    hidden_size: int = 0
    """Size of the hidden states. 0: pooling is not supported."""
    step_bytes: int = 0
    """Memory of the largest step in addition to weights and KV cache: activations, logits, the sampler's tables."""
    position_bytes: int = 0
    """Likewise, per token of the longest sequence: token ids, block tables, rotary tables."""
    memory_utilization: float = 0.0
    """The device's default of ``--gpu-memory-utilization``; 0: the KV cache takes ``default_kv_bytes``."""
    max_num_batched_tokens: int = 0
    """The most tokens of a step, as configured or by the device's default; 0: as configured."""
    shares_memory: bool = False
    """Whether the memory is that of all ranks together."""
    has_late_results: bool = False
    """Whether the results of a step arrive after it was launched, so that nothing waits between two steps."""
    pooling: PoolingSupport = PoolingSupport()
    """What the model does with pooled hidden states."""
    verifies_drafts: bool = True
    """False: no step may verify drafts, whatever is configured."""
    multimodal: MultiModalSupport | None = None
    """What the model does with images; None: it takes none."""
    fingerprint: str = ""
    """Digest of what determines K and V besides tokens: the model's files and the configuration. Empty: unknown."""
    node_rank: int = 0
    """The machine of the worker."""
    kernels: str = ""
    """What computes, and may round differently from others."""


class ModelSurvey(Message, frozen=True):
    """What a worker would report and do, found out without loading the model (``executor/plan.py``)."""

    ready: WorkerReady
    """What it would report once the weights are loaded."""
    free_bytes: int
    """Memory that is available before."""
    weights: dict[str, int]
    """Bytes of the weights by kind: attention, mlp, experts, tables, images, others."""
    num_threads: int = 0
    """Threads with which the following was measured."""
    capability: str = ""
    """Kernels in use; empty: none."""
    bytes_per_s: float = 0.0
    """Memory bandwidth; 0: unknown."""
    decode_seconds: dict[int, float] = {}
    """Time of a step of the whole model, by its number of requests; empty: unknown."""
    prefill_seconds: float = 0.0
    """The same for a prompt of ``prefill_tokens``."""
    prefill_tokens: int = 0
    """Tokens of that prompt; 0: unknown."""


class KVCacheReady(Message, frozen=True):
    """The KV cache is allocated and programs are captured; the worker accepts plans."""

    rank: int
    """Rank of the sending worker."""
    num_kept_bytes: int = 0
    """Size of the cache if it lies in memory that outlives the worker; 0: it does not."""


class KVCacheFreed(Message, frozen=True):
    """The answer to ``FreeKVCache``."""

    rank: int
    """Rank of the sending worker."""


class FinishedTransfer(Message, frozen=True):
    """A rank is done with a ``KVTransfer``."""

    rank: int
    """Rank of the worker."""
    transfer_id: int
    """The transfer's."""
    succeeded: bytes
    """uint8 [blocks]: whether each block was moved."""


class AdapterLoaded(Message, frozen=True):
    """An adapter is in memory, or was tried."""

    rank: int
    """Rank of the sending worker."""
    number: int
    """Its number; 0: it was only tried."""
    content_hash: str
    """The hash that the load request named."""
    error: str = ""
    """Why it cannot be used; empty: it can."""


class TokenLogprobs(Message, frozen=True):
    """Log probabilities at one position, of the unprocessed logits."""

    row: int
    """Row of the step."""
    position: int
    """For prompt logprobs the token's index in the prompt, else its index among the row's tokens of this plan."""
    token_ids: bytes
    """int32 [1 + k]: the token itself, then the k most likely ones."""
    logprobs: bytes
    """float32 [1 + k]."""
    rank: int
    """Rank of the token in the whole vocabulary, 1 = most likely."""


class RowError(Message, frozen=True):
    """A row without a usable result; the step's other rows are unaffected."""

    row: int
    """Row of the step."""
    message: str
    """Error message for the client."""
    is_request_fault: bool = False
    """The request's parameters are at fault, not the model."""
    position: int = 0
    """Index of the failed token among the row's tokens of this plan."""


class ModelRunnerOutput(Message, frozen=True):
    """The result of a plan."""

    step_id: int
    """The plan's ``step_id``."""
    rank: int = 0
    """Rank of the worker that answers."""
    sampled_token_ids: bytes = b""
    """int32: the tokens of the rows that sample, concatenated row by row: of each step the accepted drafts and one
    more. A row with an error has 0 in place of that token; what follows is meaningless."""
    num_accepted: bytes = b""
    """uint8 [steps, rows that sample]: accepted drafts. Empty: none in any row."""
    num_verified: bytes = b""
    """uint8 [steps, rows that sample]: drafts that each step verified. Empty: none in any row."""
    num_draft_tokens: bytes = b""
    """uint8 [rows that sample]: drafts that the worker proposes for each row's next step. Empty: none."""
    draft_token_ids: bytes = b""
    """int32: these drafts, concatenated row by row. Grammar masks depend on them."""
    row_errors: tuple[RowError, ...] = ()
    """At most one per row."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Log probabilities of sampled tokens, for rows that report them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Log probabilities of the step's prompt tokens, for rows that report them."""
    pooler_output: tuple[tuple[int, Tensor], ...] = ()
    """For rows whose prompt is complete: row of the step, and float32 [size], or [num_prompt_tokens, size] for ALL."""
    forward_ms: float = 0.0
    """Milliseconds that the worker spent on the plan."""


class Heartbeat(Message, frozen=True):
    """A rank that is not the output rank has computed a step: it is alive and has caught up to this step."""

    rank: int
    """Rank of the worker."""
    step_id: int
    """The plan's ``step_id``."""
    forward_ms: float = 0.0
    """As in ``ModelRunnerOutput``."""


class WorkerFailed(Message, frozen=True):
    """A worker cannot continue. With ``exit_code`` 78 the model or its configuration is at fault: a restart does not
    help."""

    rank: int
    """Rank of the sending worker."""
    message: str
    """Human-readable message, one line if possible."""
    exit_code: int = 1
    """Exit code of the worker process."""
    traceback: str = ""
    """Traceback; empty if the message is sufficient."""


FromWorker = (
    WorkerReady
    | LoadProgress
    | KVCacheReady
    | AdapterLoaded
    | ModelRunnerOutput
    | Heartbeat
    | FinishedTransfer
    | KVCacheFreed
    | WorkerFailed
)


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Encodes an array for a message."""
    return Tensor(array.dtype.str, array.shape, array.tobytes())


def to_array(tensor: Tensor) -> npt.NDArray[Any]:
    """A read-only view of a message's tensor."""
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype)).reshape(tensor.shape)


def i32(column: bytes) -> I32:
    """A read-only view of an int32 column."""
    return np.frombuffer(column, dtype=np.int32)


def row_offsets(counts: I64) -> tuple[I64, I64]:
    """The places of a column's numbers if row ``i`` has ``counts[i]`` of them, one row after another.

    Returns:
        int64 [sum of counts]: the row of each number; int64 [sum of counts]: its index in the row.
    """
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]


def u8(column: bytes) -> npt.NDArray[np.uint8]:
    """A read-only view of a uint8 column."""
    return np.frombuffer(column, dtype=np.uint8)
