"""vLLM options that Octavo does not have: which are accepted, and which are refused by name.

A command line or ``LLM(...)`` call that works with vLLM works here too, or fails with one line that says what to
change. Options of ``ServerConfig`` have vLLM's names. Of the others, some ask for what Octavo always does, and some
tune things it does not have: both are accepted, the latter with a note in the log. Options that would change answers,
or who may see them, are refused. ``scripts/vllm_flags.py`` generates ``docs/vllm-flags.md`` from this table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from api.flags import ConfigError


class Verdict(Enum):
    """How an option is handled."""

    DONE = "done"
    """Always on. Values that ask for the opposite get a note."""
    NOTED = "accepted"
    """No effect here; noted in the log."""
    REFUSED = "refused"
    """The feature does not exist yet."""


@dataclass(frozen=True)
class Foreign:
    """A vLLM option."""

    name: str
    """With underscores."""
    kind: str
    """The kind of its value: ``bool``, ``value`` or ``list``."""
    verdict: Verdict
    reason: str
    """A clause: why it has no effect, or what to do instead."""
    neutral: tuple[str, ...]
    """Values that match the actual behaviour, so that no note is needed."""
    short: tuple[str, ...] = ()
    """Short flags."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def is_neutral(self, value: Any) -> bool:
        """Whether this value needs no note."""
        return value is None or str(value).lower() in {other.lower() for other in self.neutral}


TABLE = (
    (
        Verdict.DONE,
        "usage always includes the number of cached prompt tokens",
        "enable_prompt_tokens_details:bool",
    ),
    (
        Verdict.DONE,
        "the load is always tracked; see /load",
        "enable_server_load_tracking:bool",
    ),
    (
        Verdict.DONE,
        "requests are logged only with --no-disable-access-log, and never with their text",
        "disable_log_requests:bool",
    ),
    (
        Verdict.DONE,
        "scheduling always overlaps with compute; --max-in-flight-steps 1 turns that off",
        "async_scheduling:bool",
    ),
    (
        Verdict.DONE,
        "there is only one block manager",
        "use_v2_block_manager:bool",
    ),
    (
        Verdict.NOTED,
        "code from model repositories is never run",
        "trust_remote_code:bool code_revision",
    ),
    (
        Verdict.NOTED,
        "preempted requests are recomputed, never swapped",
        "swap_space=0 preemption_mode=recompute",
    ),
    (
        Verdict.NOTED,
        "metrics are always on; see /metrics",
        "kv_cache_metrics:bool kv_cache_metrics_sample "
        "show_hidden_metrics_for_version enable_mfu_metrics:bool cudagraph_metrics:bool "
        "enable_logging_iteration_details:bool aggregate_engine_logging:bool custom_histogram_buckets "
        "per_request_spec_decode_metrics=none collect_detailed_traces:list enable_layerwise_nvtx_tracing:bool",
    ),
    (
        Verdict.NOTED,
        "prompts and answers are never logged; --no-disable-access-log logs a line per request",
        "enable_log_requests:bool max_log_len enable_log_outputs:bool enable_log_deltas:bool "
        "log_error_stack:bool disable_access_log_for_endpoints",
    ),
    (
        Verdict.NOTED,
        "--log-level sets the level of all messages",
        "uvicorn_log_level=info logging_config log_config_file",
    ),
    (
        Verdict.NOTED,
        "the tokenizer is always loaded; prompts may still be token ids",
        "skip_tokenizer_init:bool tokenizer_mode=auto,hf tokenizer_pool_size=0 tokenizer_pool_type "
        "tokenizer_pool_extra_config renderer_num_workers=1",
    ),
    (
        Verdict.NOTED,
        "model capture needs no configuration",
        "-O optimization_level -cc compilation_config cudagraph_capture_sizes:list max_cudagraph_capture_size "
        "max_seq_len_to_capture max_context_len_to_capture performance_mode=balanced "
        "enable_flashinfer_autotune:bool kernel_config linear_backend=auto "
        "moe_backend=auto monokernel:bool ir_op_priority jit_monitor_mode=warn jit_monitor_verbose:bool "
        "use_fp64_gumbel:bool attention_config disable_cascade_attn:bool sparse_indexer_topk_backend=auto "
        "gdn_prefill_backend kda_prefill_backend kda_decode_backend mamba_backend mamba_ssu_algorithm "
        "replayssm_buffer_len use_replayssm:bool enable_mamba_cache_stochastic_rounding:bool "
        "mamba_cache_philox_rounds enable_mamba_shared_prefix_checkpoint:bool mamba_block_size "
        "mamba_cache_dtype=auto mamba_ssm_cache_dtype=auto mamba_cache_mode=none swa_bounded_replay:bool "
        "disable_hybrid_kv_cache_manager:bool kv_sharing_fast_prefill:bool enable_cumem_allocator:bool "
        "enable_nccl_comm_suspend:bool enable_batch_sharded_sampling:bool all2all_backend enable_hc_sp:bool "
        "engram_config",
    ),
    (
        Verdict.NOTED,
        "workers share a model without this option",
        "enable_eplb:bool eplb_config expert_placement_strategy "
        "disable_custom_all_reduce:bool "
        "enable_ep_weight_filter:bool enable_dbo:bool dbo_decode_token_threshold dbo_prefill_token_threshold "
        "ubatch_size=0 distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "max_parallel_loading_workers ray_workers_use_nsight:bool "
        "disable_nccl_for_dp_synchronization:bool dp_sync_interval cp_kv_cache_interleave_size=1 "
        "dcp_kv_cache_interleave_size=1 dcp_comm_backend dcp_q_replicate:bool "
        "dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s dp_supervisor_probe_failure_threshold "
        "enable_shm_tensor_arena:bool",
    ),
    (
        Verdict.NOTED,
        "the scheduler does not need this option",
        "num_lookahead_slots=0 max_num_partial_prefills=1 max_long_partial_prefills=1 "
        "multi_step_stream_outputs:bool scheduler_delay_factor=0 disable_async_output_proc:bool "
        "long_prefill_token_threshold_adaptive:bool scheduler_reserve_full_isl:bool watermark "
        "prefill_schedule_interval=1 prefix_caching_hash_algo prefix_match_unit "
        "prefix_cache_retention_interval worker_use_ray:bool engine_use_ray:bool max_num_scheduled_tokens "
        "fault_tolerance_config watchdog_config",
    ),
    (
        Verdict.NOTED,
        "images are processed in one way, without these options",
        "media_io_kwargs mm_processor_cache_gb "
        "mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_hasher_algorithm mm_encoder_tp_mode "
        "mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
        "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin interleave_mm_strings:bool "
        "skip_mm_profiling:bool video_pruning_rate video_pruning_method "
        "mm_tensor_ipc mm_ipc_gpu_memory_gb mm_device_do_normalize:bool mm_processor_device "
        "disable_mm_preprocessor_cache:bool disable_chunked_mm_input:bool ec_manager_config",
    ),
    (
        Verdict.NOTED,
        "weights are read directly from their files",
        "use_tqdm_on_load:bool safetensors_load_strategy safetensors_prefetch_block_size "
        "safetensors_prefetch_num_threads ignore_patterns:list pt_load_map_location model_loader_extra_config",
    ),
    (
        Verdict.NOTED,
        "there is one grammar backend, which needs no configuration",
        "guided_decoding_backend guided_decoding_disable_fallback:bool "
        "guided_decoding_disable_any_whitespace:bool guided_decoding_disable_additional_properties:bool "
        "reasoning_config enable_reasoning:bool",
    ),
    (
        Verdict.NOTED,
        "request heads and bodies have fixed limits",
        "h11_max_incomplete_event_size h11_max_header_count",
    ),
    (
        Verdict.NOTED,
        "does not apply to this server",
        "additional_config fail_on_environ_validation:bool enable_offline_docs:bool "
        "enable_flash_late_interaction:bool cohere_is_reasoning_model:bool cohere_format fingerprint_mode "
        "fingerprint_value allow_deprecated_quantization:bool disable_frontend_multiprocessing:bool "
        "specialize_active_lora:bool device_ids io_processor_plugin",
    ),
    (
        Verdict.REFUSED,
        "adapters change the layers that their files name, in models of one rank; there are no prompt adapters",
        "default_mm_loras fully_sharded_loras:bool lora_target_modules:list max_lora_cls_labels "
        "lora_extra_vocab_size enable_tower_connector_lora:bool enable_mixed_moe_lora_format:bool "
        "enable_moe_shared_loras:bool enable_prompt_adapter:bool max_prompt_adapters max_prompt_adapter_token",
    ),
    (
        Verdict.REFUSED,
        'use --speculative-config, such as \'{"method": "suffix"}\'',
        "spec_method spec_model spec_tokens speculative_model num_speculative_tokens",
    ),
    (
        Verdict.REFUSED,
        "int8 has a scale per token and head, fp8 none; --kv-cache-dtype applies to all layers",
        "kv_cache_dtype_skip_layers:list calculate_kv_scales:bool",
    ),
    (
        Verdict.REFUSED,
        "config.json and --quantization say how a model is quantised",
        "quantization_config quantization_param_path",
    ),
    (
        Verdict.REFUSED,
        "one API process serves all engines, on machines that --headless adds; or start a server with "
        "--data-parallel-rank on each machine, behind a load balancer",
        "-dpm data_parallel_multi_port_external_lb:bool data_parallel_supervisor_port "
        "enable_elastic_ep:bool elastic_ep_max_dp_size "
        "enable_fault_tolerance:bool",
    ),
    (
        Verdict.REFUSED,
        "one API process handles all requests; omit it",
        "-asc api_server_count=1",
    ),
    (
        Verdict.REFUSED,
        "workers do not divide the context; --tensor-parallel-size divides the heads",
        "-dcp decode_context_parallel_size=1 -pcp prefill_context_parallel_size=1",
    ),
    (
        Verdict.REFUSED,
        "offloading is not supported yet; use a smaller model or a shorter --max-model-len",
        "cpu_offload_gb=0,0.0 cpu_offload_params:list offload_backend=auto offload_group_size=0 "
        "offload_num_in_group=1 offload_params:list offload_prefetch_step=1 kv_offloading_size=0 "
        "kv_offloading_backend=native enable_sleep_mode:bool sleep_mode_backend=cumem "
        "sleep_mode_offload_cudagraph:bool sleep_preserve_parameter_names:list",
    ),
    (
        Verdict.REFUSED,
        "sharing the KV cache with other servers is not supported yet; omit it",
        "kv_transfer_config kv_events_config ec_transfer_config weight_transfer_config tokens_only:bool",
    ),
    (
        Verdict.REFUSED,
        "external classes and functions cannot be loaded; omit it",
        "worker_cls=auto worker_extension_cls scheduler_cls logits_processors:list middleware:list "
        "model_class_overrides tool_parser_plugin reasoning_parser_plugin "
        "chat_template_text_format",
    ),
    (
        Verdict.REFUSED,
        "only built-in model classes are supported; docs/models.md lists them",
        "hf_config_path config_format=auto,hf diffusion_config",
    ),
    (
        Verdict.REFUSED,
        "use --hf-overrides with this key of config.json",
        "rope_scaling rope_theta",
    ),
    (
        Verdict.REFUSED,
        "prompts must be text, token ids or images; embeddings are not supported yet",
        "enable_prompt_embeds:bool enable_mm_embeds:bool mm_encoder_only:bool",
    ),
    (
        Verdict.REFUSED,
        "server-side tools are not supported; run tools in the client",
        "tool_server",
    ),
    (
        Verdict.REFUSED,
        "log probabilities are always those of the raw logits; omit it",
        "logprobs_mode=raw_logprobs",
    ),
    (
        Verdict.REFUSED,
        "not supported yet; omit it",
        "enable_per_request_metrics:bool "
        "profiler_config max_num_active_seqs "
        "enable_return_routed_experts:bool aux_output_config return_sampling_mask:bool "
        "enable_trace_replay:bool watermark_config disable_sliding_window:bool",
    ),
    (
        Verdict.REFUSED,
        "certificates are read once at startup; restart the server to renew them",
        "enable_ssl_refresh:bool",
    ),
    (
        Verdict.REFUSED,
        "use numactl or taskset to bind the server to cores",
        "numa_bind:bool numa_bind_cpus:list numa_bind_nodes:list",
    ),
    (
        Verdict.REFUSED,
        "there is only one device; use --gpu-memory-utilization",
        "device_memory_utilization",
    ),
)
"""Verdict, reason and names: ``name``, ``name:bool`` or ``name:list``, with neutral values after ``=``, and short flags
before them. False is neutral for a bool; where the verdict is DONE, True is."""


_WORKING = """
    allow_credentials allowed_headers allowed_methods allowed_origins api_key attention_backend block_size
    chat_template chat_template_content_format convert data_parallel_address data_parallel_backend
    data_parallel_external_lb data_parallel_hybrid_lb
    data_parallel_rank data_parallel_rpc_port data_parallel_size data_parallel_size_local data_parallel_start_rank
    default_chat_template_kwargs device disable_fastapi_docs
    disable_log_stats disable_uvicorn_access_log distributed_executor_backend download_dir dtype
    enable_expert_parallel
    enable_auto_tool_choice enable_chunked_prefill enable_force_include_usage enable_prefix_caching
    enable_request_id_headers enable_tokenizer_info_endpoint enforce_eager exclude_tools_when_tool_choice_none
    generation_config gpu_memory_utilization headless hf_overrides hf_token host kv_cache_dtype kv_cache_memory_bytes
    load_format
    log_level long_prefill_token_threshold master_addr master_port max_logprobs max_model_len max_num_batched_tokens
    max_num_queued_reqs max_num_queued_tokens max_num_seqs model model_impl nnodes node_rank num_gpu_blocks_override
    otlp_traces_endpoint
    override_generation_config pipeline_parallel_size pooler_config port quantization reasoning_parser response_role
    return_tokens_as_token_ids
    revision root_path runner scheduling_policy seed served_model_name shutdown_timeout speculative_config ssl_ca_certs
    ssl_cert_reqs
    ssl_certfile ssl_ciphers ssl_keyfile stream_interval structured_outputs_config task tensor_parallel_size
    tokenizer tokenizer_revision tool_call_parser trust_request_chat_template uds
"""
WORKING = frozenset(_WORKING.split())
"""vLLM names that ``ServerConfig`` has. Its other options are Octavo's own."""


def _read_table() -> Iterator[Foreign]:
    for verdict, reason, words in TABLE:
        short: tuple[str, ...] = ()
        for word in words.split():
            if word.startswith("-"):
                short = (word,)
                continue
            head, _, values = word.partition("=")
            name, _, kind = head.partition(":")
            neutral = tuple(values.split(",")) if values else ()
            if kind == "bool":
                neutral = (str(verdict is Verdict.DONE),)
            yield Foreign(name, kind or "value", verdict, reason, neutral, short)
            short = ()


FOREIGN = {option.name: option for option in _read_table()}
"""By name. An option of the same name in ``ServerConfig`` takes precedence."""


def take_foreign(values: Mapping[str, Any], ours: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Splits vLLM options that are not ours from the values of a command line, file or call.

    Args:
        values: By name.
        ours: Names of our own options.

    Returns:
        The remaining values, and a note for each option that has no effect.

    Raises:
        ConfigError: An option asks for a feature that does not exist.
    """
    own = set(ours)
    rest: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in values.items():
        option = FOREIGN.get(name) if name not in own else None
        if option is None:
            rest[name] = value
        elif option.is_neutral(value):
            continue
        elif option.verdict is Verdict.REFUSED:
            raise ConfigError(f"{spell(option, value)}: {option.reason}")
        else:
            notes.append(f"{spell(option, value)} ({option.reason})")
    return rest, notes


def spell(option: Foreign, value: Any) -> str:
    """An option as written on the command line."""
    if option.kind == "bool":
        return option.flag if value else "--no-" + option.flag[2:]
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{option.flag} {text if len(text) <= 40 else text[:37] + '...'}"


def add_foreign_arguments(parser: argparse.ArgumentParser, ours: Iterable[str]) -> None:
    """Adds the flags, hidden from ``--help``, which lists only flags that have an effect."""
    own = set(ours)
    for option in FOREIGN.values():
        if option.name in own:
            continue
        common: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if option.kind == "bool":
            parser.add_argument(*option.short, option.flag, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(*option.short, option.flag, nargs="*" if option.kind == "list" else None, **common)
