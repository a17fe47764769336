"""What is counted: under the names and labels that boards ask for, and so that series of one thing agree."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.fakes import MODEL, Connection, FakeServer
from tests.unit.conftest import Api

LABELS = {"model_name": MODEL, "engine": "0"}
NAMES = set(
    re.findall(
        r"\w+",
        """
    cache_config_info e2e_request_latency_seconds engine_sleep_state generation_tokens gpu_cache_usage_perc
    gpu_prefix_cache_hits gpu_prefix_cache_queries inter_token_latency_seconds iteration_tokens_total
    kv_cache_usage_perc num_preemptions num_requests_running num_requests_waiting num_requests_waiting_by_reason
    prefix_cache_hits prefix_cache_queries prompt_tokens prompt_tokens_cached request_decode_time_seconds
    request_generation_tokens request_inference_time_seconds request_max_num_generation_tokens
    request_params_max_tokens request_params_n request_prefill_kv_computed_tokens request_prefill_time_seconds
    request_prompt_tokens request_queue_time_seconds request_success request_time_per_output_token_seconds
    time_per_output_token_seconds time_per_prefill_token_request_seconds time_to_first_token_seconds
    admission_rejections
""",
    )
)
"""vLLM's."""


def sample(server: FakeServer, name: str, **labels: str) -> float:
    value = server.metrics.registry.get_sample_value(f"vllm:{name}", {**LABELS, **labels})
    assert value is not None, name
    return value


async def test_names_and_labels(api: Api) -> None:
    await api.complete("x", n=2)
    text = (await api.get("/metrics")).text
    names = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    assert {f"vllm:{name}" for name in NAMES} <= {name.removesuffix("_total") for name in names} | names
    for line in text.splitlines():
        if line.startswith("vllm:"):
            assert 'engine="0"' in line and f'model_name="{MODEL}"' in line, line
    assert sample(api.server, "engine_sleep_state", sleep_state="awake") == 1
    assert sample(api.server, "num_requests_waiting_by_reason", reason="capacity") == 0
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE)


async def test_series_of_one_thing_agree(api: Api) -> None:
    server = api.server
    await api.complete("hello", n=3)
    server.engine.steps_left = 0
    connections = [
        Connection(server.app, "/v1/completions", {"prompt": "never runs", "max_tokens": 9}) for _ in range(3)
    ]
    while server.engine.num_unfinished < 3:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for connection in connections:
        connection.leave()
        await connection.task
    server.engine.steps_left = None
    await api.complete("world", use_beam_search=True, n=2)
    for total, histogram in (("prompt_tokens", "request_prompt_tokens"), ("generation_tokens", None)):
        series = histogram or "request_generation_tokens"
        assert sample(server, f"{total}_total") == sample(server, f"{series}_sum") > 0
    assert sample(server, "request_success_total", finished_reason="abort") == 3
    assert sample(server, "request_max_num_generation_tokens_count") == 2
    assert sample(server, "request_prompt_tokens_count") == 4


async def test_a_step_counts_prompts_and_what_it_generates(server: FakeServer) -> None:
    from engine_core.messages import SchedulerStats

    metrics = server.metrics
    await Api(server).complete("hello", max_tokens=4)
    before = sample(server, "iteration_tokens_total_sum")
    metrics.on_step(SchedulerStats(num_scheduled_tokens=7), 1, [])
    assert sample(server, "iteration_tokens_total_sum") - before == 7


@pytest.mark.parametrize("status", [200, 404])
async def test_statuses_are_grouped(api: Api, status: int) -> None:
    response = await api.get("/v1/models" if status == 200 else "/nothing")
    assert response.status_code == status
    text = (await api.get("/metrics")).text
    handler = "/v1/models" if status == 200 else "none"
    assert f'http_requests_total{{handler="{handler}",method="GET",status="{status // 100}xx"}} 1.0' in text
