"""What is said of parameters before a request starts, and what is counted of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.config import ServerConfig, check_config
from api.errors import RequestError
from api.flags import ConfigError, build
from api.llm import LLM
from api.params.sampling import MAX_STOP_TOKEN_IDS, ModelLimits, SamplingParams, child_seed, resolve_params
from engine_core.messages import ResolvedParams
from tests.fakes import FakeServer
from tests.unit.conftest import Api

LIMITS = ModelLimits(max_model_len=64, vocab_size=5000, max_logprobs=20)


def resolve(params: SamplingParams, child: int = 0) -> ResolvedParams:
    resolved = resolve_params(params, 4, LIMITS, None)
    return msgspec.structs.replace(resolved, seed=child_seed(resolved.seed, child))


def test_lists_that_every_step_looks_at_are_bounded() -> None:
    with pytest.raises(RequestError, match="stop_token_ids may contain at most"):
        SamplingParams(stop_token_ids=[1] * (MAX_STOP_TOKEN_IDS + 1))
    with pytest.raises(RequestError, match="logprob_token_ids may contain at most 20"):
        resolve(SamplingParams(logprobs=0, logprob_token_ids=list(range(21))))
    assert resolve(SamplingParams(allowed_token_ids=[7, 5] * 100_000)).allowed_token_ids == (7, 5)


def test_completions_of_one_request_have_seeds_of_their_own() -> None:
    seeds = [resolve(SamplingParams(n=100, seed=-1), child).seed for child in range(100)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**64 for seed in seeds)
    assert seeds == [child_seed(2**64 - 1, child) for child in range(100)]
    assert resolve(SamplingParams(seed=5)).seed == 5
    assert resolve(SamplingParams()).seed != resolve(SamplingParams()).seed


def test_a_prompt_may_leave_room_for_one_token() -> None:
    limits = ModelLimits(max_model_len=8, vocab_size=50)
    assert resolve_params(SamplingParams(max_tokens=None), 7, limits, None).max_tokens == 1
    with pytest.raises(RequestError, match="set max_tokens to 1 or less"):
        resolve_params(SamplingParams(max_tokens=2), 7, limits, None)
    with pytest.raises(RequestError, match="no room for output"):
        resolve_params(SamplingParams(max_tokens=1), 8, limits, None)


async def test_n_is_counted_once_per_prompt(server: FakeServer, api: Api) -> None:
    await api.complete(["one", "two"], n=3)
    counts = {"n": 2, "max_tokens": 6}
    for name, count in counts.items():
        sample = f"vllm:request_params_{name}_count"
        assert server.metrics.registry.get_sample_value(sample, {"model_name": "fake-model", "engine": "0"}) == count


def test_names_of_vllm_without_effect() -> None:
    given = SamplingParams(output_kind=2, flat_logprobs=True, extra_args={"a": 1}, seed=1)
    assert resolve(given) == resolve(SamplingParams(seed=1))


OPTIONS = [
    ({"pipeline_parallel_size": 2, "distributed_executor_backend": "inline"}, "each rank is a process"),
    ({"enable_chunked_prefill": False}, "needs --max-num-batched-tokens"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_the_offline_class_checks_its_options_as_the_server_does(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(build(ServerConfig, options))
    with pytest.raises(ValueError, match=message):
        LLM(**options)


def test_words_of_tokens_that_the_model_does_not_have() -> None:
    """A tokenizer may know more tokens than the model has rows for."""
    tokenizer = FakeServer().model.tokenizer
    (ids,) = tokenizer.encode_batch(["bad"], add_special_tokens=False)
    small = ModelLimits(max_model_len=8, vocab_size=max(ids))
    with pytest.raises(RequestError, match=f"the token {max(ids)}") as caught:
        resolve_params(SamplingParams(max_tokens=1, bad_words=["bad"]), 1, small, tokenizer)
    assert caught.value.param == "bad_words"
