"""Keyword arguments of ``LLM``, for editors and type checkers. Written by ``scripts/llm_options.py``."""

from __future__ import annotations

from typing import Literal, TypedDict


class LLMOptions(TypedDict, total=False):
    """The server's options by their long names with underscores, and vLLM's that are accepted.

    Sizes may be texts such as ``"4GiB"`` or ``"8k"``.
    """

    host: str
    port: int
    uds: str | None
    api_key: list[str] | str
    served_model_name: list[str] | str
    tokenizer: str | None
    revision: str | None
    tokenizer_revision: str | None
    hf_token: str | None
    seed: int | None
    download_dir: str | None
    chat_template: str | None
    chat_template_content_format: Literal["auto", "string", "openai"]
    default_chat_template_kwargs: dict[str, object]
    trust_request_chat_template: bool
    enable_auto_tool_choice: bool
    tool_call_parser: str | None
    exclude_tools_when_tool_choice_none: bool
    reasoning_parser: str | None
    structured_outputs_config: dict[str, object]
    max_stored_responses: int
    max_stored_response_bytes: int | str
    response_role: str
    generation_config: str
    override_generation_config: dict[str, object]
    max_logprobs: int
    return_tokens_as_token_ids: bool
    stream_interval: int
    strict: bool
    runner: Literal["auto", "generate", "pooling", "embed", "embedding", "score"]
    task: Literal["auto", "generate", "pooling", "embed", "embedding", "score"]
    convert: Literal["auto", "none", "embed"]
    pooler_config: dict[str, object]
    ssl_keyfile: str | None
    ssl_certfile: str | None
    ssl_ca_certs: str | None
    ssl_cert_reqs: int
    ssl_ciphers: str | None
    max_body_size: int | str
    root_path: str
    allowed_origins: list[str] | str
    allowed_hosts: list[str] | str
    allowed_methods: list[str] | str
    allowed_headers: list[str] | str
    allow_credentials: bool
    disable_fastapi_docs: bool
    enable_tokenizer_info_endpoint: bool
    enable_request_id_headers: bool
    enable_force_include_usage: bool
    sse_keep_alive_interval: float
    shutdown_timeout: float
    disable_access_log: bool
    disable_uvicorn_access_log: bool
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
    disable_log_stats: bool
    otlp_traces_endpoint: str | None
    metrics_require_key: bool
    max_num_seqs: int
    max_num_batched_tokens: int | str
    max_in_flight_steps: int
    scheduling_policy: Literal["fcfs", "priority"]
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int | str
    max_num_queued_reqs: int | None
    max_num_queued_tokens: int | None
    enable_prefix_caching: bool
    gpu_memory_utilization: float | None
    kv_cache_memory: int | str | None
    kv_cache_memory_bytes: int | str | None
    num_gpu_blocks_override: int | None
    dtype: Literal["auto", "float32", "float", "bfloat16", "float16", "half"]
    quantization: str | None
    max_model_len: int | str | None
    hf_overrides: dict[str, object]
    load_format: Literal["auto", "safetensors", "gguf", "dummy"]
    enforce_eager: bool
    tensor_parallel_size: int
    pipeline_parallel_size: int
    device: str
    attention_backend: str | None
    block_size: int | None
    num_threads: int | None
    distributed_executor_backend: Literal["mp", "inline", "simulated"]
    simulated_device: dict[str, object]
    check_every_step: bool
    max_worker_restarts: int
    enable_prompt_tokens_details: object
    enable_server_load_tracking: object
    disable_log_requests: object
    async_scheduling: object
    use_v2_block_manager: object
    trust_remote_code: object
    code_revision: object
    swap_space: object
    preemption_mode: object
    kv_cache_metrics: object
    kv_cache_metrics_sample: object
    show_hidden_metrics_for_version: object
    enable_mfu_metrics: object
    cudagraph_metrics: object
    enable_logging_iteration_details: object
    aggregate_engine_logging: object
    custom_histogram_buckets: object
    per_request_spec_decode_metrics: object
    collect_detailed_traces: object
    enable_layerwise_nvtx_tracing: object
    enable_log_requests: object
    max_log_len: object
    enable_log_outputs: object
    enable_log_deltas: object
    log_error_stack: object
    disable_access_log_for_endpoints: object
    uvicorn_log_level: object
    logging_config: object
    log_config_file: object
    skip_tokenizer_init: object
    tokenizer_mode: object
    tokenizer_pool_size: object
    tokenizer_pool_type: object
    tokenizer_pool_extra_config: object
    renderer_num_workers: object
    optimization_level: object
    compilation_config: object
    cudagraph_capture_sizes: object
    max_cudagraph_capture_size: object
    max_seq_len_to_capture: object
    max_context_len_to_capture: object
    performance_mode: object
    disable_custom_all_reduce: object
    enable_flashinfer_autotune: object
    kernel_config: object
    linear_backend: object
    moe_backend: object
    monokernel: object
    ir_op_priority: object
    jit_monitor_mode: object
    jit_monitor_verbose: object
    use_fp64_gumbel: object
    attention_config: object
    disable_cascade_attn: object
    sparse_indexer_topk_backend: object
    gdn_prefill_backend: object
    kda_prefill_backend: object
    kda_decode_backend: object
    mamba_backend: object
    mamba_ssu_algorithm: object
    replayssm_buffer_len: object
    use_replayssm: object
    enable_mamba_cache_stochastic_rounding: object
    mamba_cache_philox_rounds: object
    enable_mamba_shared_prefix_checkpoint: object
    mamba_block_size: object
    mamba_cache_dtype: object
    mamba_ssm_cache_dtype: object
    mamba_cache_mode: object
    swa_bounded_replay: object
    disable_hybrid_kv_cache_manager: object
    kv_sharing_fast_prefill: object
    enable_cumem_allocator: object
    enable_nccl_comm_suspend: object
    enable_batch_sharded_sampling: object
    all2all_backend: object
    enable_hc_sp: object
    engram_config: object
    enable_expert_parallel: object
    enable_eplb: object
    eplb_config: object
    expert_placement_strategy: object
    enable_ep_weight_filter: object
    enable_dbo: object
    dbo_decode_token_threshold: object
    dbo_prefill_token_threshold: object
    ubatch_size: object
    distributed_timeout_seconds: object
    cpu_distributed_timeout_seconds: object
    max_parallel_loading_workers: object
    ray_workers_use_nsight: object
    master_addr: object
    master_port: object
    disable_nccl_for_dp_synchronization: object
    dp_sync_interval: object
    cp_kv_cache_interleave_size: object
    dcp_kv_cache_interleave_size: object
    dcp_comm_backend: object
    dcp_q_replicate: object
    data_parallel_backend: object
    data_parallel_address: object
    data_parallel_rpc_port: object
    data_parallel_supervisor_port: object
    dp_supervisor_probe_interval_s: object
    dp_supervisor_probe_timeout_s: object
    dp_supervisor_probe_failure_threshold: object
    enable_shm_tensor_arena: object
    num_lookahead_slots: object
    max_num_partial_prefills: object
    max_long_partial_prefills: object
    num_scheduler_steps: object
    multi_step_stream_outputs: object
    scheduler_delay_factor: object
    disable_async_output_proc: object
    long_prefill_token_threshold_adaptive: object
    scheduler_reserve_full_isl: object
    watermark: object
    prefill_schedule_interval: object
    prefix_caching_hash_algo: object
    prefix_match_unit: object
    prefix_cache_retention_interval: object
    worker_use_ray: object
    engine_use_ray: object
    max_num_scheduled_tokens: object
    fault_tolerance_config: object
    watchdog_config: object
    limit_mm_per_prompt: object
    media_io_kwargs: object
    mm_processor_kwargs: object
    mm_processor_cache_gb: object
    mm_processor_cache_type: object
    mm_shm_cache_max_object_size_mb: object
    mm_hasher_algorithm: object
    mm_encoder_tp_mode: object
    mm_encoder_attn_backend: object
    mm_encoder_attn_dtype: object
    mm_encoder_fp8_scale_path: object
    mm_encoder_fp8_scale_save_path: object
    mm_encoder_fp8_scale_save_margin: object
    interleave_mm_strings: object
    skip_mm_profiling: object
    language_model_only: object
    video_pruning_rate: object
    video_pruning_method: object
    mm_tensor_ipc: object
    mm_ipc_gpu_memory_gb: object
    mm_device_do_normalize: object
    mm_processor_device: object
    disable_mm_preprocessor_cache: object
    disable_chunked_mm_input: object
    ec_manager_config: object
    allowed_local_media_path: object
    allowed_media_domains: object
    use_tqdm_on_load: object
    safetensors_load_strategy: object
    safetensors_prefetch_block_size: object
    safetensors_prefetch_num_threads: object
    ignore_patterns: object
    pt_load_map_location: object
    model_loader_extra_config: object
    guided_decoding_backend: object
    guided_decoding_disable_fallback: object
    guided_decoding_disable_any_whitespace: object
    guided_decoding_disable_additional_properties: object
    reasoning_config: object
    enable_reasoning: object
    h11_max_incomplete_event_size: object
    h11_max_header_count: object
    additional_config: object
    fail_on_environ_validation: object
    enable_offline_docs: object
    enable_flash_late_interaction: object
    cohere_is_reasoning_model: object
    cohere_format: object
    fingerprint_mode: object
    fingerprint_value: object
    allow_deprecated_quantization: object
    disable_frontend_multiprocessing: object
    specialize_active_lora: object
    device_ids: object
    io_processor_plugin: object
