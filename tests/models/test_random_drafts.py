"""Requests that come, run alone or together, lose their blocks and are aborted at random, with drafts of any quality:
tokens, log probabilities and vectors are those of requests without drafts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine_core.messages import ResolvedParams, ResolvedPoolingParams
from executor.adapter_files import adapter_hash
from executor.config import LoRAConfig, SpeculativeConfig
from executor.device.base import Device
from executor.device.cpu import CpuDevice
from executor.messages import LoadAdapter, LoRARequest, SchedulerOutput
from executor.request_states import RequestStates
from tests import tiny
from tests.late_device import LateDevice
from tests.lora import write_adapter
from tests.models.harness import random_tokens
from tests.models.test_late_device import BLOCK_SIZE, REQUESTS, Engine, op_set

__all__ = ["op_set"]

Request = tuple[list[int], ResolvedParams | ResolvedPoolingParams]

OTHERS: list[Request] = [
    ([17], ResolvedParams(temperature=0.0, max_tokens=40)),
    (random_tokens(31, 11), ResolvedParams(seed=11, temperature=0.7, max_tokens=40)),
    (random_tokens(5, 12) * 4, ResolvedParams(seed=12, allowed_token_ids=(40, 41, 42), logprobs=1, max_tokens=50)),
    (random_tokens(6, 13), ResolvedParams(temperature=0.0, max_tokens=25, num_speculative_tokens=0)),
    (random_tokens(8, 14), ResolvedParams(seed=14, presence_penalty=0.5, num_speculative_tokens=2, max_tokens=35)),
    (random_tokens(32, 15), ResolvedParams(seed=15, max_tokens=1)),
]
ALL: list[Request] = [*REQUESTS, *OTHERS]


@pytest.fixture(autouse=True)
def many_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that drafts come to several places where a state is kept."""
    monkeypatch.setattr(RequestStates, "tokens_of_drafts", BLOCK_SIZE)


class AdaptedEngine(Engine):
    """Some requests have one of two adapters."""

    def __init__(self, device: Device, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        lora = LoRAConfig(enable_lora=True, max_loras=2, max_lora_rank=8)
        super().__init__(device, monkeypatch, lora=lora, **options)
        for number in (1, 2):
            path = write_adapter(tiny.checkpoint("llama"), rank=3 * number, seed=number)
            self.worker.handle(LoadAdapter(number, LoRARequest(str(number), number, str(path), adapter_hash(path))))
        handle = self.worker.handle

        def handle_adapted(plan: SchedulerOutput) -> bool:
            requests = [msgspec.structs.replace(each, lora_id=adapter_of(each.token_ids)) for each in plan.new_reqs]
            return handle(msgspec.structs.replace(plan, new_reqs=tuple(requests)))

        monkeypatch.setattr(self.worker, "handle", handle_adapted)


def adapter_of(token_ids: bytes) -> int:
    """By the first token, as prompts that begin alike share blocks."""
    return int(np.frombuffer(token_ids, np.int32)[0]) % 3


def expected_of(engine: Engine) -> list[Any]:
    """Output, log probabilities and vector of each request."""
    for index, request in enumerate(ALL):
        engine.add(index, *request)
    engine.run()
    return [told(engine, index) for index in range(len(ALL))]


def told(engine: Engine, index: int) -> tuple[list[int], Any, Any]:
    return engine.outputs[index], engine.logprobs.get(index, []), engine.vectors.get(index)


def drafts(folder: Path, expected: list[Any], chooser: random.Random) -> SpeculativeConfig:
    """A proposer of drafts that are right, wrong or both, or found in what was said before."""
    count = chooser.choice((1, 2, 4, 7))
    if chooser.random() < 0.3:
        config = SpeculativeConfig(method="suffix", num_speculative_tokens=count, max_cached_requests=9)
        return msgspec.structs.replace(config, min_token_prob=0.0, is_adaptive=chooser.random() < 0.5)
    path = folder / "scripts.json"
    scripts = [{"prompt": prompt, "output": found[0]} for (prompt, _), found in zip(ALL, expected, strict=True)]
    path.write_text(json.dumps(scripts))
    return SpeculativeConfig(
        method="scripted",
        num_speculative_tokens=count,
        script=str(path),
        wrong_every=chooser.choice((0, 1, 2, 3, 5, 9)),
        is_adaptive=chooser.random() < 0.3,
    )


def run_at_random(engine: Engine, chooser: random.Random, num_requests: int) -> tuple[dict[int, int], set[int]]:
    """Lets requests come, go on and leave in any order, alone or in company.

    Returns:
        By index in the engine, the request of ``ALL`` that it is; and the indices of those that were aborted.
    """
    asked: dict[int, int] = {}
    aborted: set[int] = set()
    company = chooser.choice((0.0, 0.03, 0.2))
    waiting = [chooser.randrange(len(ALL)) for _ in range(num_requests)]
    while waiting or engine.scheduler.requests or engine.in_flight:
        if waiting and (not engine.scheduler.requests or chooser.random() < company):
            index = len(engine.outputs)
            asked[index] = waiting.pop()
            engine.add(index, *ALL[asked[index]])
        if engine.scheduler.requests and chooser.random() < 0.01:
            index = chooser.choice([*engine.scheduler.requests])
            engine.scheduler.abort_request(index)
            aborted.add(index)
        if not (chooser.random() < 0.7 and engine.launch()) and engine.in_flight:
            engine.retire()
    return asked, aborted


SETUPS: dict[str, tuple[type[Engine], Any, dict[str, Any]]] = {
    "plain": (Engine, CpuDevice, {}),
    "few blocks": (Engine, CpuDevice, {"num_blocks": 6, "max_num_batched_tokens": 24}),
    "plans of several steps": (Engine, CpuDevice, {"num_scheduler_steps": 4, "max_in_flight_steps": 1}),
    "windows": (Engine, CpuDevice, {"windows": True, "num_blocks": 9}),
    "states": (Engine, CpuDevice, {"family": "qwen3_next", "num_blocks": 9}),
    "adapters": (AdaptedEngine, CpuDevice, {}),
    "late": (Engine, lambda: LateDevice(by_itself=False), {"num_blocks": 9}),
}


def compare(name: str, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, num_requests: int) -> None:
    """Computes all requests without drafts, then some at random with drafts."""
    kind, device, setup = SETUPS[name]
    chooser = random.Random(seed)
    expected = expected_of(kind(device(), monkeypatch, **setup))
    engine = kind(device(), monkeypatch, speculative=drafts(folder, expected, chooser), **setup)
    asked, aborted = run_at_random(engine, chooser, num_requests)
    engine.scheduler.check_integrity()
    for index, number in asked.items():
        tokens, logprobs, vector = told(engine, index)
        output, all_logprobs, expected_vector = expected[number]
        if index in aborted:
            assert tokens == output[: len(tokens)], (index, number)
            continue
        assert tokens == output, (index, number)
        if name != "late":  # products of torch depend a little on how many rows there are
            assert (logprobs, vector) == (all_logprobs, expected_vector), (index, number)


@pytest.mark.parametrize("name", SETUPS)
def test_random_drafts_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(name, 1, tmp_path, monkeypatch, 10)
