"""Configuration that the executor floor reads.

Frozen msgspec Structs. The command line is derived from the fields: a field's name, type, default, range and help text
(``Meta.description``) become a flag, so a new option is one new field here. ``Meta.extra`` may hold ``flags`` (short or
alternative spellings), ``parse`` (``"bytes"`` or ``"tokens"`` for human sizes such as ``4GiB`` or ``32k``), ``auto``
(the value that the word stands for), ``group`` (its heading in ``--help``, if not the struct's) and ``internal`` (no
flag: filled in while the configuration is resolved).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]

NO_QUANTIZATION = frozenset({"none", "unquantized"})
"""Those for weights in the dtype of the activations, whatever the checkpoint has."""
VECTOR_POOLINGS = ("LAST", "MEAN", "CLS", "MAX", "MEAN_SQRT_LEN", "WEIGHTED_MEAN")
"""The last position, the mean of all positions, the first one; the largest numbers of any position; the sum of all
divided by the root of their number; the mean in which each position counts as often as its number, from 1."""
QUANTIZATION_ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq", "modelopt_fp4": "modelopt"}
"""vLLM's names of kernels, and the methods of the checkpoints that they read."""
QUANTIZATIONS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gguf",
    "gptq",
    "int4",
    "int8",
    "modelopt",
    "mxfp4",
    "none",
    "unquantized",
    "auto-round",
    *QUANTIZATION_ALIASES,
)
"""All values of ``--quantization``."""

KV_CODE_NAMES = {
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int4": "uint8",
}
"""Values of ``--kv-cache-dtype`` for a KV cache in codes, and torch's names of the dtypes; see ``ops.INT4_CACHE``."""
KV_CACHE_DTYPES = ("auto", *KV_CODE_NAMES, "bfloat16", "float16", "half", "float32", "float")
"""All values of ``--kv-cache-dtype``."""

MAX_DRAFT_TOKENS = 32
"""Maximum drafts of a request in one step."""
MAX_STEPS_AHEAD = 32
"""Most steps of a request in flight, in all plans together."""


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every configuration struct."""

    group: ClassVar[str] = "Engine"
    """The heading of its flags in ``--help``."""


class GGUFTensor(Config, frozen=True, array_like=True):
    """One entry of a GGUF file's tensor table."""

    name: str
    shape: tuple[int, ...]
    """Row-major shape, slowest dimension first, as in torch."""
    ggml_type: int
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    file: int = 0
    """Index of the file in ``GGUFHeader.files``."""


class GGUFHeader(Config, frozen=True):
    """The part of a GGUF header that workers need, read once by the process that resolves the model.

    ``metadata`` omits the ``tokenizer.*`` keys.
    """

    metadata: dict[str, bool | int | float | str | list[bool | int | float | str]]
    tensors: list[GGUFTensor]
    files: list[str] = []
    """Names of the parts of a split model, in one folder; empty: a single file."""


class VisionFile(Config, frozen=True):
    """The vision part of a GGUF model, in a file of its own."""

    path: str
    header: GGUFHeader
    fields: dict[str, object]
    """What config.json would say about the whole model."""

    @property
    def as_path(self) -> Path:
        return Path(self.path)

    @property
    def kind(self) -> str:
        """See ``projector_type``."""
        return projector_type(self.header.metadata)


def projector_type(metadata: Mapping[str, Any]) -> str:
    """What a vision part in a GGUF file is, in llama.cpp's words; the oldest files do not say it."""
    return str(metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type", "mlp")))


DTYPE_NAMES = ("bfloat16", "float16", "half", "float32", "float")
"""Names of types that torch and config.json use, too."""
GOOD_DTYPES = f"one of {', '.join(sorted(DTYPE_NAMES))} (--dtype takes precedence)"


class ModelConfig(Config, frozen=True):
    """Which weights to load, and how."""

    group: ClassVar[str] = "Model"

    model: Annotated[
        str,
        Meta(
            description="Hugging Face hub id, local folder or GGUF file; owner/name:Q4_K_M selects a GGUF file of a "
            "repository. Default: the demo model.",
            extra={"flags": ["--model"]},
        ),
    ] = ""
    dtype: Annotated[
        Literal["auto", "float32", "float", "bfloat16", "float16", "half"],
        Meta(
            description="Data type of weights and activations. auto: the checkpoint's type, with float32 as bfloat16 "
            "except in encoders."
        ),
    ] = "auto"
    quantization: Annotated[
        str | None,
        Meta(
            description="How weights are quantised. Default: as in the model's files. int8, int4, "
            "fp8: quantised while they are loaded. none: converted to --dtype while they are loaded.",
            extra={"flags": ["-q"]},
        ),
    ] = None
    quantized_activations: Annotated[
        Literal["auto", "float", "int8", "fp8"],
        Meta(
            description="Arithmetic of products with quantised weights. float: that of --dtype, exactly as with the "
            "dequantised weights. int8: activations are rounded to 8 bits in groups of 32. fp8: with weights in "
            "FP8, activations are rounded to FP8 per token, on GPUs that multiply FP8. auto: as the files say, for 8 "
            "bits per token; int8 for GGUF files, float with --dtype float32."
        ),
    ] = "auto"
    imatrix: Annotated[
        str,
        Meta(
            description="File that says how important each column of the weights is, for --quantization int4; "
            "octavo imatrix makes it."
        ),
    ] = ""
    max_model_len: Annotated[
        Annotated[int, Meta(ge=-1)] | None,
        Meta(
            description="Maximum length of prompt plus output in tokens. Default: from the model's configuration; "
            "'auto': the largest that fits the KV cache.",
            extra={"parse": "tokens", "auto": -1},
        ),
    ] = None
    hf_overrides: Annotated[
        dict[str, object], Meta(description="JSON object of values that override the model's config.json.")
    ] = {}
    load_format: Annotated[
        Literal[
            "auto", "safetensors", "gguf", "bitsandbytes", "dummy", "fastsafetensors", "runai_streamer", "tensorizer"
        ],
        Meta(
            description="Format of the weights. auto: safetensors, else GGUF, else pickled weights, converted once. "
            "bitsandbytes: safetensors. dummy: random weights, for benchmarks. fastsafetensors, runai_streamer and "
            "tensorizer read through the package of that name."
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[
        str,
        Meta(
            description="Data type of cached K and V. auto: that of the activations. int8: half the memory of 16 bits, "
            "with a scale per token and head. fp8 (fp8_e4m3), fp8_e5m2: the same without scales, less accurate; "
            "fp8_e4m3 uses those of the checkpoint if it has any. int4: K as int8, V in 4 bits with a scale and a "
            "minimum for each 32 columns, for heads of 128 numbers and more.",
            extra={"group": "Cache"},
        ),
    ] = "auto"
    model_impl: Annotated[
        Literal["auto", "octavo", "vllm", "transformers"],
        Meta(
            description="Implementation of the model. octavo (or vllm): built in. transformers: that of transformers, "
            "slower. auto: built in if there is one, otherwise transformers."
        ),
    ] = "auto"
    enforce_eager: Annotated[bool, Meta(description="Run ops one by one instead of replaying a captured program.")] = (
        False
    )
    language_model_only: Annotated[
        bool, Meta(description="Serve a multimodal model for text alone, without the memory of its other parts.")
    ] = False
    gguf: Annotated[GGUFHeader | None, Meta(extra={"internal": True})] = None
    vision: Annotated[VisionFile | None, Meta(extra={"internal": True})] = None
    calibration: Annotated[tuple[int, ...], Meta(extra={"internal": True})] = ()
    """Tokens of a text on which the model may be measured."""
    weights: Annotated[str, Meta(extra={"internal": True})] = ""
    """Folder of the safetensors files, if not the model's."""
    dense: Annotated[tuple[str, ...], Meta(extra={"internal": True})] = ()
    """Folders of dense layers that follow pooling, in the model's folder; a dot: a layer in the model's own files."""
    num_pooled: Annotated[int, Meta(extra={"internal": True})] = 1
    """Vectors behind each other that pooling makes of a text."""
    token_dense: Annotated[str, Meta(extra={"internal": True})] = ""
    """Folder of a layer that makes vectors of tokens. Empty: ``dense`` makes them, if it takes single states."""
    token_weights: Annotated[str, Meta(extra={"internal": True})] = ""
    """Folder of a layer that weighs tokens, for sparse vectors."""


class ParallelConfig(Config, frozen=True):
    """How a model is distributed over workers."""

    tensor_parallel_size: Annotated[
        Positive,
        Meta(
            description="Number of workers that each layer is split across, each with cores of its own. Tokens do not "
            "depend on it.",
            extra={"flags": ["-tp"]},
        ),
    ] = 1
    pipeline_parallel_size: Annotated[
        Positive, Meta(description="Number of pipeline stages, each with consecutive layers.", extra={"flags": ["-pp"]})
    ] = 1
    enable_expert_parallel: Annotated[
        bool,
        Meta(
            description="Each of the --tensor-parallel-size workers has whole experts, not a part of each. On GPUs; "
            "CPUs balance better without.",
            extra={"flags": ["-ep"]},
        ),
    ] = False

    nnodes: Annotated[
        Positive,
        Meta(
            description="Number of machines that share the model: each has consecutive pipeline stages, or, with more "
            "machines than stages, workers of one. Start the same command on each.",
            extra={"flags": ["-n"], "group": "Machines"},
        ),
    ] = 1
    node_rank: Annotated[
        int,
        Meta(
            ge=0,
            description="Which of the machines this is. 0 serves the API; the others run workers, as it tells them.",
            extra={"flags": ["-r"], "group": "Machines"},
        ),
    ] = 0
    master_addr: Annotated[
        str,
        Meta(description="Address of machine 0, as the others reach it.", extra={"group": "Machines"}),
    ] = ""
    master_port: Annotated[
        int,
        Meta(ge=1, le=65535, description="Port on which machine 0 waits for the others.", extra={"group": "Machines"}),
    ] = 29501
    node_address: Annotated[
        str,
        Meta(
            description="Address of this machine at which the others send it hidden states. Default: that from which "
            "it reaches --master-addr.",
            extra={"group": "Machines"},
        ),
    ] = ""
    cluster_key: Annotated[
        str,
        Meta(
            description="File with the secret that all machines need, which octavo cluster-key makes. What they send "
            "each other is encrypted, unless --private-interface says otherwise.",
            extra={"group": "Machines"},
        ),
    ] = ""

    private_interface: Annotated[
        str,
        Meta(
            description="Network interface of this machine, such as eth1, in a network that you trust. Columns "
            "of layers and hidden states of stages then travel over it by Gloo, not encrypted. Default: over encrypted "
            "connections, which are quicker for few tokens and slower for long prompts in fast networks. GPUs need it.",
            extra={"group": "Machines"},
        ),
    ] = ""

    ray_address: Annotated[
        str,
        Meta(
            description="Address of the Ray cluster with --distributed-executor-backend ray or --data-parallel-backend "
            "ray, such as 10.0.0.1:6379. Default: the one of this machine, or of RAY_ADDRESS.",
            extra={"group": "Machines"},
        ),
    ] = ""

    num_mirrors: Annotated[Positive, Meta(extra={"internal": True})] = 1
    """Ranks that each compute the whole model, to test multi-rank operation independently of sharding."""

    @property
    def num_shares(self) -> int:
        """Ranks that divide a model among them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def world_size(self) -> int:
        return self.num_shares * self.num_mirrors

    @property
    def most_local_workers(self) -> int:
        """Of one copy of the model, workers of the machine that has most; see ``executor.parallel.places``."""
        tp_size, pp_size = self.tensor_parallel_size, self.pipeline_parallel_size
        if self.nnodes <= pp_size:
            return -(-pp_size // self.nnodes) * tp_size
        return -(-tp_size // (self.nnodes // pp_size))


class DeviceConfig(Config, frozen=True):
    """The device of each worker."""

    device: Annotated[
        str,
        Meta(
            description="Device to run on: cpu, cuda (GPUs of NVIDIA, or of AMD with ROCm), or one from an installed "
            "package. auto: the best available."
        ),
    ] = "auto"
    attention_backend: Annotated[
        str | None,
        Meta(
            description="Attention backend. On GPUs also sdpa, flash_attn or flashinfer, for comparison: tokens may "
            "then depend on what runs beside a request. Default: the first that supports each layer."
        ),
    ] = None
    matmul: Annotated[
        Literal["auto", "cublas"],
        Meta(
            description="What computes products on GPUs. cublas: the library of the GPU's vendor, for comparison; "
            "tokens may then depend on what runs beside a request."
        ),
    ] = "auto"
    block_size: Annotated[
        Positive | None, Meta(description="Tokens per KV block. Default: the attention backend's preferred size.")
    ] = None
    num_threads: Annotated[
        Positive | None, Meta(description="CPU threads per worker. Default: one per usable core.")
    ] = None
    first_index: Annotated[int, Meta(extra={"internal": True})] = 0
    """Index of the first worker's GPU: those before belong to other replicas."""


class SimulatedDevice(Config, frozen=True):
    """A simulated device (``executor/simulated.py``).

    A step takes ``step_us + token_us * tokens + context_us * context tokens read``.
    """

    step_us: Annotated[float, Meta(ge=0, description="Fixed time per step in microseconds.")] = 5000.0
    token_us: Annotated[float, Meta(ge=0, description="Time per scheduled token in microseconds.")] = 20.0
    context_us: Annotated[float, Meta(ge=0, description="Time per token of context read in microseconds.")] = 0.002
    vocab_size: Positive = 49152
    hidden_size: Positive = 64
    """Size of pooled vectors."""
    max_model_len: Positive = 8192
    num_blocks: Positive = 65536
    block_size: Positive = 32
    eos_token_id: int = -1
    """A token id that the device never samples; -1: it may sample any id."""


MIN_SAMPLES = 64
"""Tokens that a step may sample in any case where drafts are on by default: a CPU gains nothing from more drafts."""


class SpeculativeConfig(Config, frozen=True):
    """The source of draft tokens (``executor/speculative``). Outputs never depend on it."""

    method: str
    """Name in ``executor/speculative/registry.py``."""
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=MAX_DRAFT_TOKENS)]
    """Maximum drafts of a request in one step."""
    prompt_lookup_min: Positive = 1
    """Number of last tokens that must occur earlier in the text. The methods ``suffix`` and ``ngram`` propose what
    followed there."""
    prompt_lookup_max: Positive = 24
    """Number of last tokens that are compared at most."""
    max_spec_factor: Annotated[float, Meta(gt=0)] = 2.0
    """Drafts per token that was found again."""
    min_token_prob: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Drafts end where the probability that all of them are accepted falls below this."""
    max_cached_requests: Annotated[int, Meta(ge=0)] = 0
    """Earlier outputs per tenant that are searched as well; 0: none."""
    is_adaptive: bool = True
    """Draft lengths follow the measured acceptance and the measured times of steps. False: they depend on the tokens
    alone, as several ranks need it."""
    is_default: bool = False
    """Nobody asked for drafts: they are for workers that verify them at little cost alone, and few in a step."""
    draft: ModelConfig | None = None
    """The second model, of the methods ``draft_model`` and ``eagle3``."""
    draft_sample_method: Literal["greedy", "probabilistic"] = "greedy"
    """How it chooses drafts: its likeliest tokens, or as the large model's tokens are drawn."""
    script: str = ""
    """File of ``executor/scripts.py``, read by the method ``scripted``. Its outputs replace the drafts of
    a second model."""
    acceptance: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Probability that such a draft is the script's token; otherwise it is another one."""
    wrong_every: int = 0
    """The method ``scripted`` makes one in this many drafts wrong; 0: none."""

    @property
    def has_model(self) -> bool:
        """Whether a second model, or a head, proposes the drafts."""
        return self.method in ("draft_model", "eagle3", "mtp")

    def max_samples(self, max_num_seqs: int) -> int:
        """Most tokens that a step samples, which determines the memory for logits."""
        return max(max_num_seqs, MIN_SAMPLES) if self.is_default else max_num_seqs * (1 + self.num_speculative_tokens)


DEFAULT_STEP_TOKENS = 512
"""Default of ``--max-num-batched-tokens`` on CPUs."""


class LoRAConfig(Config, frozen=True):
    """Low-rank adapters."""

    group: ClassVar[str] = "Adapters"

    enable_lora: Annotated[bool, Meta(description="Serve LoRA adapters beside the model.")] = False
    max_loras: Annotated[
        Positive,
        Meta(description="Maximum number of different adapters of the requests that run at the same time."),
    ] = 1
    max_lora_rank: Annotated[Positive, Meta(description="Largest rank of an adapter.")] = 16
    max_cpu_loras: Annotated[
        Positive | None,
        Meta(
            description="Maximum number of adapters in memory; the one unused for longest makes room for another. "
            "Default: --max-loras."
        ),
    ] = None
    lora_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="Data type of adapters in memory, which must be that of the activations. auto: that type."),
    ] = "auto"

    @property
    def max_loaded(self) -> int:
        """Most adapters in memory; 0: none are served."""
        return max(self.max_loras, self.max_cpu_loras or 0) if self.enable_lora else 0


class StepSize(Config, frozen=True):
    """The largest step that is ever planned."""

    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive | None = None
    """None: the device's default."""
    max_in_flight_steps: Positive = 2
    """Steps that workers may have at a time."""


class ExecutorConfig(Config, frozen=True):
    """The configuration of a worker."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    device: DeviceConfig = DeviceConfig()
    distributed_executor_backend: Annotated[
        Literal["mp", "ray", "inline", "simulated"],
        Meta(
            description="mp: worker processes. ray: the same, on machines that a Ray cluster provides, one for each "
            "pipeline stage unless --nnodes says how many. inline: the worker runs inside the engine core (pdb works). "
            "simulated: a simulated device, no model.",
            extra={"group": "Machines"},
        ),
    ] = "mp"
    speculative: Annotated[SpeculativeConfig | None, Meta(extra={"internal": True})] = None
    """None: one token per step and request."""
    lora: LoRAConfig = LoRAConfig()
    simulated_device: Annotated[
        SimulatedDevice,
        Meta(
            description="JSON object: parameters of the device for --distributed-executor-backend simulated.",
            extra={"group": "Testing"},
        ),
    ] = SimulatedDevice()
    step_size: Annotated[StepSize, Meta(extra={"internal": True})] = StepSize()
    """The largest step that the scheduler may plan; filled in by the engine core."""
    forced_outputs: Annotated[
        str,
        Meta(
            description='JSON file with a list of {"prompt": [ids], "output": [ids]}: requests with these prompts get '
            "these outputs, whatever the model computes. For benchmarks.",
            extra={"group": "Testing"},
        ),
    ] = ""
    kv_cache_dir: Annotated[str, Meta(extra={"internal": True})] = ""
    """The engine core's; filled in by it."""
    memory_share: Annotated[int | None, Meta(extra={"internal": True})] = None
    """Bytes of the host's memory for the weights of workers that load beside those of other engines; None: all that is
    free. Filled in by the engine core."""
    check_every_step: Annotated[
        bool,
        Meta(
            description="Check the integrity of blocks, slots and results after every step (slow).",
            extra={"group": "Testing"},
        ),
    ] = False

    @property
    def max_draft_tokens(self) -> int:
        """Maximum drafts of a request in one step."""
        return 0 if self.speculative is None else self.speculative.num_speculative_tokens

    @property
    def num_lookahead_tokens(self) -> int:
        """Tokens beyond those of a step for which a request has blocks: a draft model caches its own drafts there."""
        return 0 if self.speculative is None or not self.speculative.has_model else self.max_draft_tokens
