"""Flags, files, environment variables and keyword arguments: one configuration, or one line that says what is wrong."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import vllm_flags

from api.cli import resolve, serve_parser
from api.config import GROUPS, ServerConfig, from_environment, make_config, unused_variables, with_speculation
from api.flags import ConfigError, options
from api.vllm_options import FOREIGN, WORKING, Verdict
from engine_core.config import SpeculativeConfig


def config_of(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[ServerConfig, list[str]]:
    return resolve(serve_parser().parse(arguments), environment or {})


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad command line gives."""
    try:
        config_of(*arguments)
    except ConfigError as error:
        return str(error)
    except SystemExit as end:
        assert end.code == 2
        captured = capsys.readouterr()
        assert not captured.out and captured.err.count("\n") == 1, captured.err
        return captured.err
    raise AssertionError(f"{arguments} was taken")


def test_flags_are_spelt_as_people_spell_them() -> None:
    config, notes = config_of(
        "--max_model_len=4k", "--served_model_name", "a_b", "--no_enable_prefix_caching", "m/odel"
    )
    assert config.engine.executor.model.max_model_len == 4000 and config.served_model_name == ["a_b"]
    assert not config.engine.cache.enable_prefix_caching and config.engine.executor.model.model == "m/odel"
    assert not notes


def test_keys_of_json_objects_are_flags_too() -> None:
    config, _ = config_of(
        "--pooler-config.pooling_type", "MEAN", "--hf-overrides.rope.theta=2.5", "--hf-overrides.rope.kind", "x",
        "--hf-overrides.ids+", "1", "--hf-overrides.ids+=[2,3]", "--hf-overrides.on", "--port", "1",
    )  # fmt: skip
    assert config.pooler_config.pooling_type == "MEAN" and config.port == 1
    assert config.engine.executor.model.hf_overrides == {
        "rope": {"theta": 2.5, "kind": "x"},
        "ids": [1, 2, 3],
        "on": True,
    }


def test_short_flags_of_vllm() -> None:
    """All those of engines, ranks and machines."""
    place = ["-dpa", "10.0.0.1", "-dpp", "5000", "-dpr", "1", "-dpb", "mp", "--headless", "--cluster-key", "key"]
    config, notes = config_of("-dp", "3", "-dpl", "2", *place, "-tp", "1", "-pp", "1")
    assert (config.data_parallel_size, config.data_parallel_size_local, config.data_parallel_start_rank) == (3, 2, 1)
    assert (config.data_parallel_address, config.data_parallel_rpc_port) == ("10.0.0.1", 5000)
    config, _ = config_of("-dp", "2", "-dpn", "1", "-dpe")
    assert config.data_parallel_rank == 1 and config.data_parallel_external_lb
    assert config_of("-dp", "2", "-dpl", "1", "-dph")[0].data_parallel_hybrid_lb
    config, _ = config_of("-n", "2", "-r", "1", "-pp", "2", "--master-addr", "10.0.0.1", "--cluster-key", "key")
    assert (config.engine.executor.parallel.nnodes, config.engine.executor.parallel.node_rank) == (2, 1)
    assert not notes
    with pytest.raises(ConfigError, match="--data-parallel-multi-port-external-lb: one API process"):
        config_of("-dpm")


def test_every_default_is_valid() -> None:
    for option in options(ServerConfig):
        assert option.convert(option.default) == option.default, option.flag


def test_other_spellings_of_an_option() -> None:
    config, _ = make_config({"task": "embed", "kv_cache_memory_bytes": 5 << 20, "allowed_origins": '["a", "b"]'})
    assert config.runner == "embed" and config.engine.cache.kv_cache_memory == 5 << 20
    assert config.allowed_origins == ["a", "b"]
    assert config_of("--allowed-origins", '["*"]')[0].allowed_origins == ["*"]
    assert make_config({"served_model_name": "one"})[0].served_model_name == ["one"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-modle-len", "5"], "octavo: unknown option --max-modle-len; did you mean --max-model-len?"),
        (["--max_modle_len=5"], "unknown option --max-modle-len; did you mean --max-model-len?"),
        (["--xyzzy"], "unknown option --xyzzy (see octavo serve --help)"),
        (["a/b", "c/d"], "unexpected argument 'c/d'"),
        (["--port"], "--port: expected one argument"),
        (["--port", "70000"], "--port: expected int <= 65535, got '70000'"),
        (["--root-path", "llm"], "--root-path llm: expected a path such as /llm"),
        (["--ssl-certfile", "x"], "HTTPS needs --ssl-keyfile"),
        (["a/b", "--model", "c/d"], "two different models given"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refusal(capsys, *arguments)


def test_help_has_groups_and_hides_what_does_not_work() -> None:
    text = serve_parser().format_help()
    assert "such as 32MiB. (default: 32MiB)" in text and "such as 64MiB. (default: 64MiB)" in text
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[-len(GROUPS) :] == list(GROUPS)
    assert {option.group for option in options(ServerConfig)} <= set(GROUPS)
    assert text.index("--simulated-device") > text.index("Testing:") > text.index("--port ")
    assert "--max-prompt-adapters" not in text and "--swap-space" not in text
    assert len(serve_parser().format_usage().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--enable-prompt-adapter"], "--enable-prompt-adapter: adapters change the layers that their files name"),
        (["--lora-modules", "a=b"], "--lora-modules needs --enable-lora"),
        (["--enable-lora", "--lora-modules", "a"], "--lora-modules: expected name=path or a JSON object with name"),
        (["--enable-lora", "--lora-modules", '{"name": 1}'], "--lora-modules: Expected `str`, got `int`"),
        (["--enable-lora", "--lora-modules", "a=b", "a=c"], "--lora-modules: two adapters are named 'a'"),
        (["--enable-lora", "--allowed-lora-path", "/x"], "--allowed-lora-path needs --admin-api-key"),
        (["--quantization", "quip"], "--quantization quip: not supported yet; leave it out for models that are"),
        (["-tp", "2", "--distributed-executor-backend", "inline"], "--tensor-parallel-size 2: each rank is a process"),
        (["-pp=2", "--distributed-executor-backend=inline"], "--pipeline-parallel-size 2: each rank is a process"),
        (["--speculative-config", '{"method": "eagle"}'], "method 'eagle': heads of EAGLE 1 and 2 are not supported"),
        (["--speculative-model", "m/draft"], "--speculative-model m/draft: use --speculative-config, such as"),
        (["--kv-cache-dtype", "fp6"], "--kv-cache-dtype fp6: unknown data type; choose from auto, int8, fp8, fp8_e4m3"),
        (["--calculate-kv-scales"], "--calculate-kv-scales: int8 has a scale per token and head, fp8 none"),
        (["--api-server-count", "2"], "--api-server-count 2"),
        (["--data-parallel-hybrid-lb"], "--data-parallel-hybrid-lb needs --data-parallel-size-local"),
        (["-dp", "2", "--data-parallel-rank", "2"], "--data-parallel-rank 2: must be less than --data-parallel-size"),
        (["-dp=2", "--data-parallel-size-local=1"], "engines on other machines need --data-parallel-address"),
        (["--data-parallel-size-local", "2"], "--data-parallel-size-local 2: must not exceed --data-parallel-size"),
        (["--data-parallel-external-lb"], "--data-parallel-external-lb needs --data-parallel-rank"),
        (["--cpu-offload-gb", "4"], "--cpu-offload-gb 4"),
    ],
)
def test_features_that_do_not_exist_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, *arguments)


ORDINARY = """
m/odel --seed 0 --swap-space 4 --disable-log-requests --disable-log-stats --trust-remote-code --tokenizer-mode auto
--enable-prompt-tokens-details --kv-cache-dtype auto --async-scheduling --limit-mm-per-prompt.image 0 -tp 1 -O3
--gpu-memory-utilization 0.9 --api-server-count 1 --cpu-offload-gb 0 --no-enable-lora --uvicorn-log-level info
"""


def test_an_ordinary_command_line_of_vllm() -> None:
    config, notes = config_of(*shlex.split(ORDINARY))
    assert config.seed == 0 and config.engine.cache.gpu_memory_utilization == 0.9
    flags = {note.partition(" (")[0] for note in notes}
    assert {"--swap-space 4", "--trust-remote-code"} <= flags
    assert config.limit_mm_per_prompt == {"image": 0}
    assert not flags & {"--disable-log-requests", "--async-scheduling", "--kv-cache-dtype auto"}


def test_keyword_arguments_of_vllm() -> None:
    config, notes = make_config(
        {
            "trust_remote_code": False,
            "seed": 0,
            "swap_space": 4,
            "disable_log_stats": True,
            "tokenizer_mode": "auto",
            "task": "generate",
            "skip_tokenizer_init": False,
            "enforce_eager": True,
            "tensor_parallel_size": 1,
            "quantization": None,
            "cpu_offload_gb": 0,
            "compilation_config": {"mode": 3},
            "disable_custom_all_reduce": True,
        }
    )
    assert config.runner == "generate" and config.engine.executor.model.enforce_eager
    assert any(note.startswith("--swap-space 4 (preempted requests are recomputed") for note in notes)
    for options_ in (
        {"enable_prompt_adapter": True},
        {"speculative_config": {"method": "medusa"}},
    ):
        with pytest.raises(ConfigError, match="not supported yet|use int8|prompt adapters"):
            make_config(options_)
    with pytest.raises(ConfigError, match="unknown option 'max_modle_len'; did you mean max_model_len?"):
        make_config({"max_modle_len": 5})


@pytest.mark.parametrize("option", FOREIGN.values(), ids=FOREIGN)
def test_every_foreign_option_does_what_its_verdict_says(option: Any) -> None:
    ours = {name for option in options(ServerConfig) for name in option.names}
    assert option.name not in ours, "it works by now: take it out of the table"
    value: Any = {"bool": True, "list": ["x"], "value": "x"}[option.kind]
    if option.verdict is Verdict.REFUSED:
        with pytest.raises(ConfigError, match=option.flag):
            make_config({option.name: value})
    else:
        config, notes = make_config({option.name: value})
        assert config == with_speculation(ServerConfig()) and len(notes) == (option.verdict is Verdict.NOTED)
    for neutral in (None, *option.neutral):
        assert make_config({option.name: neutral}) == (with_speculation(ServerConfig()), [])


def test_the_table_in_the_documents() -> None:
    ours = {name for option in options(ServerConfig) for name in option.names}
    assert ours >= WORKING
    assert vllm_flags.TARGET.read_text() == vllm_flags.text(), "run scripts/vllm_flags.py"


def test_environment() -> None:
    found = from_environment(
        {"VLLM_API_KEY": "k", "VLLM_LOGGING_LEVEL": "WARN", "VLLM_CPU_KVCACHE_SPACE": "2", "OCTAVO_LOG_LEVEL": ""}
    )
    assert found == {"api_key": ["k"], "log_level": "warning", "kv_cache_memory": 2 << 30}
    assert from_environment({"VLLM_CPU_KVCACHE_SPACE": "0"}) == {}
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE: expected"):
        from_environment({"VLLM_CPU_KVCACHE_SPACE": "much"})
    assert unused_variables({"VLLM_USE_V1": "1", "VLLM_API_KEY": "k", "HOME": "/"}) == ["VLLM_USE_V1"]
    config, _ = config_of("--log-level", "debug", environment={"OCTAVO_LOG_LEVEL": "error"})
    assert config.log_level == "debug"


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: 5\nmax-model-len: 8K\nswap_space: 4\ntrust-remote-code: true\n")
    config, notes = config_of("--config", str(file), "--port", "6")
    assert config.port == 6 and config.engine.executor.model.max_model_len == 8192 and len(notes) == 2
    file.write_text("prot: 5\n")
    assert "unknown option 'prot'; did you mean port?" in refusal(capsys, "--config", str(file))


def speculation_of(**fields: Any) -> SpeculativeConfig | None:
    return make_config({"speculative_config": fields})[0].engine.executor.speculative


def test_speculative_configs_of_vllm() -> None:
    default = speculation_of()
    assert default is not None and default.method == "suffix" and default.is_default
    assert speculation_of(method="none") is None
    assert config_of("--distributed-executor-backend", "simulated")[0].engine.executor.speculative is None
    config, _ = config_of(
        "--speculative-config.method", "suffix", "--speculative-config.suffix_decoding_max_tree_depth", "12"
    )
    suffix = config.engine.executor.speculative
    assert suffix is not None and (suffix.method, suffix.prompt_lookup_max) == ("suffix", 12)
    assert suffix.num_speculative_tokens == 32 and suffix.max_cached_requests == 10_000
    own = speculation_of(
        method="suffix",
        num_speculative_tokens=32,
        suffix_decoding_max_cached_requests=0,
        suffix_decoding_max_spec_factor=1,
        suffix_decoding_min_token_prob=0.2,
    )
    assert own is not None and (own.max_cached_requests, own.max_spec_factor, own.min_token_prob) == (0, 1.0, 0.2)
    for given, expected in (
        ({}, (5, 5)),
        ({"prompt_lookup_max": 4}, (4, 4)),
        ({"prompt_lookup_min": 2}, (2, 2)),
        ({"ngram_prompt_lookup_min": 2, "ngram_prompt_lookup_max": 4}, (2, 4)),
    ):
        ngram = speculation_of(model="[ngram]", num_speculative_tokens=3, disable_logprobs=True, **given)
        assert ngram is not None and ngram.method == "ngram"
        assert (ngram.prompt_lookup_min, ngram.prompt_lookup_max) == expected


def test_a_draft_model_is_named_with_its_quantization() -> None:
    draft = speculation_of(model="m/draft", quantization="int8", draft_tensor_parallel_size=1)
    drawn = speculation_of(method="mtp", draft_sample_method="probabilistic")
    assert drawn is not None and drawn.draft_sample_method == "probabilistic"
    assert draft is not None and draft.draft_sample_method == "greedy"
    assert draft is not None and draft.method == "draft_model" and draft.num_speculative_tokens == 5
    assert draft.draft is not None and (draft.draft.model, draft.draft.quantization) == ("m/draft", "int8")


def test_draft_heads_are_named_as_vllm_does() -> None:
    for fields in ({"method": "eagle3", "model": "m/head"}, {"model": "m/Model-EAGLE3"}):
        head = speculation_of(**fields)
        assert head is not None and head.method == "eagle3" and head.draft is not None
        assert head.draft.model == fields["model"] and head.num_speculative_tokens == 3
    for method in ("mtp", "deepseek_mtp", "glm4_moe_mtp"):
        mtp = speculation_of(method=method, num_speculative_tokens=1)
        assert mtp is not None and (mtp.method, mtp.num_speculative_tokens, mtp.draft) == ("mtp", 1, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_speculative_tokens": 3}, 'method is missing; use "suffix", "ngram", "draft_model", "eagle3" or "mtp"'),
        ({"method": "none", "num_speculative_tokens": 3}, "num_speculative_tokens is not for the method 'none', which"),
        ({"method": "draft_model"}, "model is missing: one of the same family"),
        ({"method": "eagle3"}, "model is missing: an EAGLE-3 head that was trained for the model"),
        (
            {"method": "mtp", "model": "m/head"},
            "model is for the methods 'draft_model' and 'eagle3'; omit it for 'mtp'",
        ),
        ({"model": "m/draft", "quantization": "int3"}, "quantization must be one of awq, "),
        ({"model": "m/draft", "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size must be 1, got 2"),
        ({"model": "m/draft", "use_heterogeneous_vocab": True}, "both models must have the same vocabulary; omit it"),
        ({"model": "m/draft", "draft_sample_method": "beam"}, "must be greedy or probabilistic, got 'beam'"),
        (
            {"method": "suffix", "draft_sample_method": "greedy"},
            "is for the methods 'draft_model', 'eagle3' and 'mtp'; omit it for 'suffix'",
        ),
        ({"method": "suffics"}, "unknown method 'suffics'; use"),
        ({"method": "ngram"}, "num_speculative_tokens is missing; 4 is a good start"),
        ({"method": "suffix", "num_speculative_tokens": 33}, "must be a whole number from 1 to 32, got 33"),
        ({"method": "suffix", "num_speculative_tokens": True}, "must be a whole number from 1 to 32, got True"),
        ({"method": "suffix", "prompt_lookup_max": 3}, "prompt_lookup_max is for the method 'ngram'; omit it"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 2}, "must be a number from 0 to 1, got 2"),
        ({"method": "suffix", "suffix_decoding_max_tree_dept": 2}, "did you mean suffix_decoding_max_tree_depth?"),
        (
            {"method": "suffix", "model": "m/draft"},
            "model is for the methods 'draft_model' and 'eagle3'; omit it for 'suffix'",
        ),
        ({"method": "suffix", "disable_by_batch_size": 4}, "the number of drafts adapts to the load by itself"),
        ({"method": "suffix", "acceptance_method": "typical_acceptance_sampler"}, "drafts are verified exactly"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 5, "prompt_lookup_max": 4},
            "prompt_lookup_min must be at most prompt_lookup_max (4), got 5",
        ),
    ],
)
def test_mistakes_in_speculative_configs_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^--speculative-config: ") as error:
        speculation_of(**fields)
    assert message in str(error.value)
