"""Mamba-2 (Dao and Gu, arXiv:2405.21060): no attention, and one block per layer. Residuals have the type of the
activations, whatever ``residual_in_fp32`` says."""

from __future__ import annotations

from executor.layers.context import ModelContext
from executor.layers.mamba import Mamba2, MambaSizes
from executor.models.base import WeightsMapper
from executor.models.decoder import ONE_NORM, CausalDecoder, DecoderParts, OneBlockLayer, no_mlp
from executor.models.lfm2 import transpose_conv

SIZE_NAMES = ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")


class Mamba2ForCausalLM(CausalDecoder):
    attribute_map = {"rms_norm_eps": "layer_norm_epsilon"}
    config_defaults = {
        "conv_kernel": 4,
        "eos_token_id": 2,
        "expand": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "max_position_embeddings": 32768,  # a state has no limit, but the tables of requests have
        "n_groups": 8,
        "num_heads": 128,
        "rms_norm_eps": 1e-5,
        "state_size": 128,
        "use_bias": False,
        "use_conv_bias": True,
    }
    mapper = WeightsMapper(
        renames=[
            (r"^model\.(backbone|lm_head)\.", r"\1."),
            (r"^backbone\.", "model."),
            (r"^model\.embeddings?\.", "model.embed_tokens."),
            (r"^model\.norm_f\.", "model.norm."),
            (r"\.(\d+)\.norm\.", r".\1.input_layernorm."),
            (r"\.mixer\.", ".self_attn."),
        ],
        transforms={r"\.conv1d\.weight$": transpose_conv},
    )

    def __init__(self, context: ModelContext) -> None:
        config = context.config
        sizes = MambaSizes.of(config, SIZE_NAMES)
        if sizes.inner != config.size("expand") * config.hidden_size:
            config.bad("head_dim", f"such that heads have {config.size('expand')} times the hidden size in columns")
        bias, conv_bias = config.boolean("use_bias"), config.boolean("use_conv_bias")

        def mixer(index: int, prefix: str) -> Mamba2:
            return Mamba2(context, sizes, conv_bias=conv_bias, in_bias=bias, out_bias=bias, prefix=prefix)

        super().__init__(context, DecoderParts(mixer, no_mlp, layer=OneBlockLayer, norms=ONE_NORM))
