"""Nemotron-H (NVIDIA, arXiv:2504.03624), Nemotron Nano 2 and Nemotron 3: a layer is one block, either Mamba-2,
attention without positions, an MLP without a gate, or experts without gates."""

from __future__ import annotations

from torch import Tensor, nn

from executor.hf_config import MAX_LAYERS, HFConfig
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from executor.layers.linear import ReplicatedLinear
from executor.layers.mamba import Mamba2, MambaSizes
from executor.layers.mlp import MLP
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.layers.self_attention import SelfAttention
from executor.models.base import WeightsMapper
from executor.models.decoder import ONE_NORM, CausalDecoder, DecoderParts, OneBlockLayer, no_mlp
from executor.models.lfm2 import transpose_conv
from executor.weights_mapper import STACKS, Stack, whole
from ops import Routing

SIZE_NAMES = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
MAMBA, ATTENTION, DENSE, EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
LETTERS = {"M": MAMBA, "*": ATTENTION, "-": DENSE, "E": EXPERTS}
"""Types of layers in ``hybrid_override_pattern``."""
OLD_TYPES = {"mamba": MAMBA, "attention": ATTENTION}
OLD_NAMES = {
    "head_dim": "attention_head_dim",
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_limit": "mamba_dt_limit",
    "use_conv_bias": "mamba_conv_bias",
}
"""Names of fields in older files."""


def block_types(config: HFConfig) -> list[str]:
    """The type of each layer."""
    if config.has("layers_block_type"):
        types = [OLD_TYPES.get(each, each) for each in config.strings("layers_block_type")]
        if not types or not set(types) <= set(LETTERS.values()):
            config.bad("layers_block_type", f"a list of {', '.join(LETTERS.values())}")
        return types
    pattern = config.string("hybrid_override_pattern", "ME*-")
    if not pattern or not set(pattern) <= set(LETTERS):
        config.bad("hybrid_override_pattern", f"a text of {' '.join(LETTERS)}")
    return [LETTERS[each] for each in pattern]


class Experts(MoE):
    """Experts without gates. With ``moe_latent_size``, projections surround them, so they read and yield fewer columns
    than there are hidden states."""

    def __init__(self, context: ModelContext, *, prefix: str) -> None:
        config = context.config
        bias = config.boolean("mlp_bias")
        latent = config.size("moe_latent_size") if config.has("moe_latent_size") else None
        config.choice("hidden_act", {"relu2": None})
        routing = Routing(
            config.size("num_experts_per_tok"),
            "sigmoid",
            normalize=config.boolean("norm_topk_prob"),
            factor=config.number("routed_scaling_factor"),
            num_groups=config.size("n_group"),
            top_groups=config.size("topk_group"),
        )
        super().__init__(
            context,
            routing,
            config.size("n_routed_experts"),
            config.size("moe_intermediate_size"),
            is_corrected=True,
            activation="relu2",
            hidden_size=latent,
            shared=("shared_experts", config.size("moe_shared_expert_intermediate_size")),
            make_shared=lambda size, prefix: MLP(context, size, bias=bias, is_summed=False, prefix=prefix),
            prefix=prefix,
        )
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if latent is not None:
            hidden, names = config.hidden_size, [f"{prefix}.fc{number}_latent_proj" for number in (1, 2)]
            self.fc1_latent_proj = ReplicatedLinear(context, hidden, latent, bias=bias, prefix=names[0])
            self.fc2_latent_proj = ReplicatedLinear(context, latent, hidden, bias=bias, prefix=names[1])

    def forward(self, x: Tensor, batch: InputBatch, routed: Tensor | None = None) -> Tensor:
        """As of ``MoE``."""
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return super().forward(x, batch, routed)
        routed = self.gate(x, batch) if routed is None else routed
        out = self.apply_experts(self.fc1_latent_proj(x, batch), batch, routed)
        shared: Tensor = self.get_submodule("shared_experts")(x, batch)
        wide: Tensor = self.fc2_latent_proj(out, batch)
        return wide + shared


class NemotronHForCausalLM(CausalDecoder):
    attribute_map = {"hidden_act": "mlp_hidden_act", "rms_norm_eps": "layer_norm_epsilon"}
    config_defaults = {
        "conv_kernel": 4,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "relu2",
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 128,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "n_group": 1,
        "n_groups": 8,
        "n_routed_experts": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "ssm_state_size": 128,
        "topk_group": 1,
        "use_bias": False,
        "use_conv_bias": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^backbone\.", "model."),
            (r"^model\.embeddings\.", "model.embed_tokens."),
            (r"^model\.norm_f\.", "model.norm."),
            (r"\.(\d+)\.norm\.", r".\1.input_layernorm."),
            (r"\.mixer\.", ".self_attn."),
        ],
        ignored=[r"^mtp\."],
        transforms={r"\.conv1d\.weight$": transpose_conv},
        stacks=[Stack(r"^(.*\.experts\.)up_proj$", {"up_proj.weight": whole}), *STACKS],
    )

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        older = {name: config.get(old) for name, old in OLD_NAMES.items() if config.has(old) and not config.has(name)}
        config = super().configure(config.replaced(**older))
        types = block_types(config)
        if len(types) > MAX_LAYERS:
            config.bad("hybrid_override_pattern", f"at most {MAX_LAYERS} layers")
        return config.replaced(num_hidden_layers=len(types))

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        types, sizes = block_types(config), MambaSizes.of(config, SIZE_NAMES)
        bias, mlp_bias, conv_bias = (config.boolean(name) for name in ("use_bias", "mlp_bias", "use_conv_bias"))

        def block(index: int, prefix: str) -> nn.Module:
            if types[index] == ATTENTION:
                return SelfAttention(context, None, prefix=prefix)
            if types[index] == DENSE:
                return MLP(context, bias=mlp_bias, prefix=prefix)
            if types[index] == EXPERTS:
                return Experts(context, prefix=prefix)
            return Mamba2(
                context,
                sizes,
                activation="mamba_hidden_act",
                conv_bias=conv_bias,
                in_bias=bias,
                out_bias=bias,
                prefix=prefix,
            )

        def norm(size: int) -> RMSNorm:
            return RMSNorm(context, size, config.rms_norm_eps, round_first=False)

        super().__init__(context, DecoderParts(block, no_mlp, norm, OneBlockLayer, ONE_NORM))
