"""Rotary position embedding and its scalings to longer sequences.

Formulas and order of operations are those of transformers, so that the tables match bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ops
from executor.base import ModelError
from executor.hf_config import MAX_POSITIONS, Fields
from executor.layers.context import ModelContext
from executor.log import get_logger

logger = get_logger()


@dataclass(frozen=True)
class RopeInput:
    """Inputs of a model's rotary angles."""

    rope: Fields
    """``rope_type``, ``rope_theta`` and the parameters of that type."""
    rotary_dim: int
    """Columns of each head that are rotated."""
    max_position: int
    """``max_position_embeddings`` of config.json."""
    max_model_len: int
    """Longest sequence served."""

    @property
    def base(self) -> float:
        return self.rope.positive("rope_theta")

    @property
    def original_max_position(self) -> int:
        return self.rope.size("original_max_position_embeddings", self.max_position, most=MAX_POSITIONS)

    def frequencies(self, base: float) -> Tensor:
        """``base ** (-2i / rotary_dim)``, float32 [rotary_dim / 2]."""
        return 1.0 / self.wavelengths(base)

    def wavelengths(self, base: float) -> Tensor:
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        result: Tensor = base**exponents
        return result


def default(given: RopeInput) -> tuple[Tensor, float]:
    """Rotary position embedding (Su et al., arXiv:2104.09864)."""
    return given.frequencies(given.base), 1.0


def linear(given: RopeInput) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al., arXiv:2306.15595)."""
    return given.frequencies(given.base) / given.rope.number("factor"), 1.0


def dynamic(given: RopeInput) -> tuple[Tensor, float]:
    """Dynamic NTK-aware scaling of the base, for lengths beyond ``max_position_embeddings``.

    With L = ``max_position_embeddings``, l the length, s = ``factor`` and d = ``rotary_dim``, the base is multiplied by
    ``(s * l / L - (s - 1)) ** (d / (d - 2))``. The power divides the lowest frequency, ``base ** -((d - 2) / d)``, by
    exactly the term in parentheses, as position interpolation does with all frequencies, and leaves the highest, 1,
    unchanged. Sections 3.1 (NTK-aware) and 3.3 (dynamic) of YaRN (Peng et al., arXiv:2309.00071) describe it; the term
    in parentheses, 1 at l = L, is transformers' form of the scale.

    transformers recomputes the base as a sequence grows. Here it is computed once, for the longest sequence served:
    cached K was rotated with it, and a request's tokens must not depend on the current length of the request or its
    neighbours. So the base is scaled only if longer sequences were configured, and then for every request.
    """
    factor, dim = given.rope.number("factor"), given.rotary_dim
    length = max(given.max_model_len, given.max_position)
    if length > given.max_position:
        logger.warning(
            "dynamic NTK: angles are scaled for --max-model-len %d, for shorter prompts too; up to %d (the "
            "default) they are the ones that the model was trained with",
            length,
            given.max_position,
        )
    stretch: float = ((factor * length / given.max_position) - (factor - 1)) ** (dim / (dim - 2))
    return given.frequencies(given.base * stretch), 1.0


def llama3(given: RopeInput) -> tuple[Tensor, float]:
    """Stretches long wavelengths, keeps short ones and interpolates in between.

    Follows the reference code of Llama 3.1 (``apply_scaling`` in ``reference_impl/model.py`` of llama-models).
    """
    rope, frequencies = given.rope, given.frequencies(given.base)
    factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    length = given.original_max_position
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    smooth = (length / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = ~(wavelengths < length / high) & ~(wavelengths > length / low)
    return torch.where(is_medium, smoothed, scaled), 1.0


def yarn(given: RopeInput) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv:2309.00071): NTK-by-parts (section 3.2) and attention scaling (3.4)."""
    rope, dim, base = given.rope, given.rotary_dim, given.base
    length = given.original_max_position
    factor = rope.number("factor", given.max_position / length)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def dimension(rotations: float) -> float:
        """The dimension that makes this many rotations over the original length."""
        return (dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(base))

    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif rope.number("mscale", 0.0) and rope.number("mscale_all_dim", 0.0):
        attention_factor = mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    else:
        attention_factor = mscale(1.0)

    low, high = dimension(rope.number("beta_fast", 32)), dimension(rope.number("beta_slow", 1))
    if rope.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    extrapolated = 1 - ramp
    wavelengths = given.wavelengths(base)
    frequencies = 1.0 / (factor * wavelengths) * (1 - extrapolated) + 1.0 / wavelengths * extrapolated
    return frequencies, attention_factor


def longrope(given: RopeInput) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al., arXiv:2402.13753): a factor for each frequency, from one of two lists.

    ``short_factor`` is for sequences up to ``original_max_position_embeddings``, ``long_factor`` for longer ones.
    transformers switches when a sequence passes that length. Here, as with ``dynamic``, the longest sequence served
    decides for every request.
    """
    rope, original = given.rope, given.original_max_position
    is_long = given.max_model_len > original
    if is_long:
        logger.warning(
            "longrope: angles are those for more than %d tokens, for shorter prompts too; --max-model-len %d gives "
            "those for short prompts",
            original,
            original,
        )
    name = "long_factor" if is_long else "short_factor"
    factors = torch.tensor(rope.numbers(name), dtype=torch.float32)
    if 2 * len(factors) != given.rotary_dim:
        rope.bad(name, f"a list of {given.rotary_dim // 2} numbers")
    factor = rope.number("factor", given.max_position / original)
    own = "long_mscale" if is_long else "short_mscale"  # of Phi-3.5-MoE
    if rope.has(own):
        attention_factor = rope.number(own)
    elif rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    else:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (factors * given.wavelengths(given.base)), attention_factor


def frequency_factors(given: RopeInput) -> tuple[Tensor, float]:
    """Divides each frequency by its own factor, as GGUF files store Llama 3's scaling (``rope_freqs.weight``)."""
    factors = torch.tensor(given.rope.numbers("factors"), dtype=torch.float32)
    if 2 * len(factors) != given.rotary_dim:
        given.rope.bad("factors", f"a list of {given.rotary_dim // 2} numbers")
    return given.frequencies(given.base) / factors, 1.0


def proportional(given: RopeInput) -> tuple[Tensor, float]:
    """Rotates the first ``partial_rotary_factor`` of the pairs of a head, by angles of the whole head (Gemma 4)."""
    half = given.rotary_dim // 2
    num_rotated = int(given.rope.number("partial_rotary_factor") * given.rotary_dim // 2)
    frequencies = given.frequencies(given.base) / given.rope.number("factor", 1.0)
    return torch.where(torch.arange(half) < num_rotated, frequencies, 0.0), 1.0


ROPE_TYPES: dict[str, Callable[[RopeInput], tuple[Tensor, float]]] = {
    "default": default,
    "dynamic": dynamic,
    "frequency_factors": frequency_factors,
    "linear": linear,
    "llama3": llama3,
    "longrope": longrope,
    "proportional": proportional,
    "su": longrope,
    "yarn": yarn,
}
"""Each returns the angles per position, float32 [rotary_dim / 2], and a factor for cosines and sines."""


def _axes(rope: Fields, num_angles: int) -> Tensor:
    """The axis of a position that turns each angle, where positions have several: int64 [num_angles].

    A section of the angles for each axis, or, interleaved (Qwen3-VL), one angle after the other as long as an axis has
    any left; what remains is the first one's.
    """
    if not rope.has("mrope_section"):
        return torch.zeros(num_angles, dtype=torch.int64)
    sections = [int(number) for number in rope.numbers("mrope_section")]
    if len(sections) != 3 or sum(sections) != num_angles or min(sections) < 0:
        rope.bad("mrope_section", f"three numbers that add up to {num_angles}")
    if not rope.boolean("mrope_interleaved", False):
        return torch.arange(3).repeat_interleave(torch.tensor(sections))
    axes = torch.zeros(num_angles, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


class RotaryEmbedding(nn.Module):
    """Rotates the heads of q and k by their tokens' positions. Layers with the same angles share one."""

    cos_sin: Tensor
    """float32 [positions, rotary_dim]: cosines, then sines. Empty until ``reserve``."""
    q_cos_sin: Tensor
    """The same times ``query_scale``; ``cos_sin`` itself without one."""

    def __init__(
        self,
        context: ModelContext,
        rope: Fields | None = None,
        *,
        head_dim: int | None = None,
        rotary_dim: int | None = None,
        is_interleaved: bool = False,
        is_rotated: bool = True,
        query_scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Computes the angles.

        Args:
            context: The model's construction context.
            rope: Rotary parameters, as returned by ``HFConfig.rope_for``. Default: ``config.rope``.
            head_dim: Size of a head. Default: ``config.head_dim``.
            rotary_dim: Columns of each head that are rotated. Default: ``partial_rotary_factor`` of them.
            is_interleaved: Pairs are adjacent columns instead of the two halves.
            is_rotated: False: all angles are 0, for queries that are scaled alone.
            query_scale: Factors of the queries: takes positions [n], int64, returns float32 [n]. All columns of a head
                must be rotated.
        """
        super().__init__()
        config = context.config
        rope = config.rope if rope is None else rope
        self.head_dim = head_dim or config.head_dim
        self.is_interleaved = is_interleaved
        if rope.string("rope_type") == "proportional":
            rotary_dim = self.head_dim
        rotary_dim = rotary_dim or int(self.head_dim * rope.number("partial_rotary_factor"))
        if not 2 <= rotary_dim <= self.head_dim:
            rope.bad("partial_rotary_factor", f"a fraction that gives 2 to head_dim ({self.head_dim}) columns")
        if query_scale is not None and rotary_dim != self.head_dim:
            rope.bad("partial_rotary_factor", "1 in a model that scales queries by their positions")
        compute = rope.choice("rope_type", ROPE_TYPES)
        self._frequencies, self._factor = compute(
            RopeInput(rope, rotary_dim, config.max_position_embeddings, context.max_model_len)
        )
        if not is_rotated:
            self._frequencies, self._factor = torch.zeros_like(self._frequencies), 1.0
        self._axes = _axes(rope, len(self._frequencies)).to(context.device)
        if not (self._frequencies.isfinite().all() and math.isfinite(self._factor)):
            raise ModelError(f"{rope.source}: the rotary parameters give angles that are not finite")
        table = torch.empty(0, rotary_dim, dtype=torch.float32, device=context.device)
        self.register_buffer("cos_sin", table, persistent=False)
        self.register_buffer("q_cos_sin", table, persistent=False)
        self._query_scale = query_scale

    @property
    def position_bytes(self) -> int:
        """Bytes of the tables per position."""
        return self.cos_sin.shape[1] * self.cos_sin.element_size() * (1 if self._query_scale is None else 2)

    def reserve(self, num_positions: int) -> None:
        """Builds the table for the positions served, which may be far fewer than the model allows."""
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), self._frequencies)
        table = torch.cat((angles.cos() * self._factor, angles.sin() * self._factor), dim=-1)
        device = self.cos_sin.device
        self.cos_sin = table.to(device)
        self.q_cos_sin = self.cos_sin
        if self._query_scale is not None:
            self.q_cos_sin = (table * self._query_scale(torch.arange(num_positions)).unsqueeze(1)).to(device)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [num_tokens, num_heads * head_dim] and k [num_tokens, num_kv_heads * head_dim], rotated."""
        if isinstance(positions, Tensor) and positions.dim() > 1:
            table = self._by_axis(positions)
            rows = torch.arange(positions.shape[1], out=torch.empty_like(positions[0]))
            rotated = (ops.rotary_embedding(x, rows, table, self.head_dim, self.is_interleaved) for x in (q, k))
            return next(rotated), next(rotated)
        return (
            self.rotate(positions, q),
            ops.rotary_embedding(k, positions, self.cos_sin, self.head_dim, self.is_interleaved),
        )

    def _by_axis(self, positions: Tensor) -> Tensor:
        """Cosines and sines [num_tokens, rotary_dim] for positions int32 [axes, num_tokens]: each axis turns some of
        the angles (M-RoPE; Wang et al., arXiv:2409.12191)."""
        whole = self.cos_sin[positions.long()]  # [axes, num_tokens, rotary_dim]
        return whole.gather(0, self._axes.repeat(2).expand(1, *whole.shape[1:]))[0]

    def rotate(self, positions: Tensor, q: Tensor) -> Tensor:
        """q [num_tokens, num_heads * head_dim], rotated."""
        return ops.rotary_embedding(q, positions, self.q_cos_sin, self.head_dim, self.is_interleaved)
