"""transformers' model of an architecture, built without weights, and what a trial run of it tells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from executor.base import ModelError
from executor.hf_config import MAX_LAYERS, MAX_POSITIONS, HFConfig, shorten
from executor.layers.context import ModelContext
from executor.models.fallback.attention import INTERFACE, STEP, SURVEY, Step, Survey, register
from ops import AttentionShape

MAX_EXPERTS = 1 << 15
TRIAL_TOKENS = 4
COMMON_NAMES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Fields that we read and every family has, some under other names."""


@dataclass
class Network:
    """A model of transformers whose attention calls go to ``step``."""

    whole: Any
    """The causal language model (``PreTrainedModel``); its output layer has all that the family does to logits."""
    base: Any
    """The part of it that computes hidden states."""
    base_name: str
    step: Step

    def hidden_states(self, ids: Tensor, positions: Tensor | None, **options: Tensor) -> Any:
        """Runs the base model on one row of tokens; returns transformers' output object.

        Args:
            ids: int64 [1, num_tokens].
            positions: int64 [1, num_tokens]; None: those of a sequence that begins here.
            options: More arguments.
        """
        return self.base(input_ids=ids, position_ids=positions, use_cache=False, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """[1, num_samples, vocab_size] of hidden states [1, num_samples, hidden_size], as ``whole`` computes them.

        Between ``isolate_head`` and ``restore_base``.
        """
        logits: Tensor = self.whole(inputs_embeds=hidden, use_cache=False).logits
        return logits

    def isolate_head(self, output_type: Any) -> None:
        """Puts a module in the place of the base model that returns the embeddings it is given as hidden states.

        Args:
            output_type: Class of the base model's output.
        """
        setattr(self.whole, self.base_name, GivenStates(output_type))

    def restore_base(self) -> None:
        setattr(self.whole, self.base_name, self.base)


class GivenStates(nn.Module):
    """Takes the place of the base model."""

    def __init__(self, output_type: Any) -> None:
        super().__init__()
        self.output_type = output_type

    def forward(self, *args: object, inputs_embeds: Tensor, **kwargs: object) -> Any:
        return self.output_type(last_hidden_state=inputs_embeds)


@dataclass
class Trial:
    """What a run on the meta device found out."""

    shapes: list[AttentionShape]
    """Of the attention calls, in order."""
    read_directly: set[str]
    """Linear layers whose weights transformers reads without calling them."""
    output_type: Any
    """Class of the base model's output."""


def read_config(config: HFConfig) -> Any:
    """transformers' configuration object.

    Raises:
        ModelError: transformers rejects the fields.
    """
    from transformers import CONFIG_MAPPING

    for name, value in config.values.items():
        limit = MAX_LAYERS if "layers" in name else MAX_EXPERTS if "experts" in name else MAX_POSITIONS
        if isinstance(value, int) and abs(value) > limit:
            config.bad(name, f"at most {limit}")
    kind = config.values.get("model_type")
    factory: Any
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        factory = CONFIG_MAPPING[kind]
    else:
        factory = model_class(config).config_class
    with as_model_errors(config.source, "transformers rejects this configuration"):
        return factory.from_dict(dict(config.values))


def model_class(config: HFConfig) -> Any:
    """transformers' class of the architecture."""
    import transformers

    try:
        found = getattr(transformers, config.architecture)
    except (AttributeError, ImportError) as error:
        raise ModelError(f"{config.source}: transformers has no {config.architecture!r}: {error}") from error
    if not getattr(found, "_supports_attention_backend", False):
        raise ModelError(f"{config.source}: {config.architecture} does not support other attention implementations")
    return found


def build_network(context: ModelContext) -> Network:
    """Builds the model on the meta device.

    Raises:
        ModelError: transformers cannot build it, or it is not a decoder over token ids and positions.
    """
    from transformers.utils.logging import set_verbosity_error

    register()
    set_verbosity_error()  # its advice is for users of transformers
    config, source = read_config(context.config), context.config.source
    for each in (config, config.get_text_config()):
        each._attn_implementation = INTERFACE
        each._experts_implementation = "eager"
    failure = "transformers cannot build this model"
    with as_model_errors(source, failure), _default_dtype(context.dtype), torch.device("meta"):
        whole = model_class(context.config)(config).eval()
    base = whole.base_model
    if base is whole:
        raise ModelError(f"{source}: {context.config.architecture} has no base model; the fallback cannot run it")
    step = Step(Survey(source, context.max_model_len))
    for module in whole.modules():
        setattr(module, STEP, step)
    return Network(whole, base, whole.base_model_prefix, step)


def try_out(network: Network, source: str, max_model_len: int) -> Trial:
    """Runs the network on the meta device to learn the shapes of its attention calls.

    Raises:
        ModelError: The network does something that the fallback does not support.
    """
    for name, module in network.whole.named_modules():
        if isinstance(module, nn.Conv1d):
            raise ModelError(f"{source}: {name} is a convolution over tokens, whose state is not supported yet")
    mask = torch.ones(1, TRIAL_TOKENS, dtype=torch.long, device="meta")
    with (
        as_model_errors(source, "transformers' implementation does more with masks than the fallback can check"),
        _implementation(network.whole, SURVEY),
    ):
        return _try_once(network, Survey(source, max_model_len), attention_mask=mask)


def _try_once(network: Network, survey: Survey, **options: Tensor) -> Trial:
    network.step.calls = survey
    read_directly: set[str] = set()
    ids = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long, device="meta")
    no_data = NoData()  # type: ignore[no-untyped-call]
    with torch.no_grad(), no_data, _without_adaptation(network.whole), _watch_weights(network.whole, read_directly):
        out = network.hidden_states(ids, ids, **options)
        network.isolate_head(type(out))
        try:
            logits = network.logits(out.last_hidden_state)
        finally:
            network.restore_base()
    assert logits.shape[:2] == ids.shape, "not one row of logits per token"
    if not survey.shapes:
        raise ModelError(f"{survey.source}: the model has no attention layers")
    return Trial(survey.shapes, read_directly, type(out))


@contextlib.contextmanager
def _implementation(network: nn.Module, name: str) -> Iterator[None]:
    """Selects an attention implementation for a while."""
    configs: dict[int, Any] = {id(each.config): each.config for each in network.modules() if hasattr(each, "config")}
    before = [config._attn_implementation for config in configs.values()]
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in zip(configs.values(), before, strict=True):
            config._attn_implementation = implementation


class NoData(TorchDispatchMode):
    """Lets code run on the meta device that looks at values: no element is set, and numbers are 0.

    So a layer that loops over the experts in use uses none.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.ops.aten.nonzero.default:
                return torch.empty(0, args[0].dim(), dtype=torch.long, device="meta")
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watch_weights(network: nn.Module, read_directly: set[str]) -> Iterator[None]:
    """Adds the names of linear layers whose weight is read from outside."""

    class Watched(nn.Linear):
        name = ""
        is_running = False

        def forward(self, x: Tensor) -> Tensor:
            self.is_running = True
            try:
                return super().forward(x)
            finally:
                self.is_running = False

        def __getattr__(self, name: str) -> Any:
            if name in ("weight", "bias") and not self.is_running:
                read_directly.add(self.name)
            return super().__getattr__(name)

    watched = []
    for name, module in network.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = Watched
            assert isinstance(module, Watched)
            module.name = name
            watched.append(module)
    try:
        yield
    finally:
        for each in watched:
            each.__class__ = nn.Linear  # type: ignore[assignment]


FROZEN = "frozen"
"""A kind of rotation that transformers does not adapt."""


def _adaptive_rotations(network: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """Rotations that transformers adapts to the longest sequence of a step: the module, the layer type if the module
    has several, and the kind."""
    for module in network.modules():
        kinds: Any = getattr(module, "rope_type", None)
        named = kinds if isinstance(kinds, dict) else {None: kinds} if isinstance(kinds, str) else {}
        for layer_type, kind in list(named.items()):
            if "dynamic" in kind or kind == "longrope":
                yield module, layer_type, kind


def _set_kind(module: Any, layer_type: str | None, kind: str) -> None:
    if layer_type is None:
        module.rope_type = kind
    else:
        module.rope_type[layer_type] = kind


@contextlib.contextmanager
def _without_adaptation(network: nn.Module) -> Iterator[None]:
    found = list(_adaptive_rotations(network))
    for module, layer_type, _ in found:
        _set_kind(module, layer_type, FROZEN)
    try:
        yield
    finally:
        for module, layer_type, kind in found:
            _set_kind(module, layer_type, kind)


def freeze_rotations(network: nn.Module, max_model_len: int, device: torch.device) -> None:
    """Makes rotations depend on ``max_model_len`` alone, not on the sequences of a step."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module, layer_type, kind in _adaptive_rotations(network):
        given = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=max_model_len, **given)
        prefix = "" if layer_type is None else f"{layer_type}_"
        setattr(module, f"{prefix}attention_scaling", scaling)
        module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
        _set_kind(module, layer_type, FROZEN)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def as_model_errors(source: str, what: str) -> Iterator[None]:
    """Whatever transformers raises for a configuration becomes one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).strip().split("\n")
        reason = shorten(" ".join(line.strip() for line in lines if line.strip()), 300)
        raise ModelError(f"{source}: {what}: {type(error).__name__}: {reason}") from error
