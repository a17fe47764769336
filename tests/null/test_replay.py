"""Recorded streams of requests, and plans that must not change.

A change that is to make no other plans (a refactor, a faster data structure) leaves the digests as they are. One that
plans otherwise on purpose says so and writes them anew: ``python -m tests.null.test_replay``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from executor.messages import SchedulerOutput
from tests.null.test_scheduler import VOCAB, Engine, make_request

TRACES = Path(__file__).parent / "traces"

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"num_blocks": 256},
    "preempting": {"num_blocks": 40, "depth": 3, "max_num_batched_tokens": 24},
    "priority": {"num_blocks": 48, "scheduling_policy": "priority", "long_prefill_token_threshold": 7},
    "whole prompts": {"num_blocks": 64, "enable_chunked_prefill": False, "max_num_batched_tokens": 48},
    "no cache": {"num_blocks": 64, "caching": False, "depth": 1, "max_num_seqs": 3},
}


class Arrival(msgspec.Struct, frozen=True):
    """A request of a trace. Its index is its place there."""

    turn: int
    """Turn of the engine core's loop before which it comes."""
    shared_tokens: int
    """Leading tokens of the prompt that others begin with, too."""
    own_tokens: int
    max_tokens: int
    min_tokens: int = 0
    priority: int = 0
    tenant: str = ""
    aborted_at: int = -1
    """Turn before which its client goes; -1: it stays."""


class Trace(msgspec.Struct):
    arrivals: list[Arrival]
    digests: dict[str, str]
    """By configuration: SHA-256 of all plans."""


def digest(trace: Trace, options: dict[str, Any]) -> str:
    """Replays a trace, and condenses what workers were told."""
    engine = Engine.create(**options)
    found = hashlib.sha256()
    plan_step = engine.scheduler.schedule

    def schedule() -> Any:
        planned = plan_step()
        if planned is not None:
            found.update(_described(planned[0]))
        return planned

    engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    shared = np.random.default_rng(7).integers(8, VOCAB, 64).tolist()
    for turn in range(1 + max(max(arrival.turn, arrival.aborted_at) for arrival in trace.arrivals)):
        for index, arrival in enumerate(trace.arrivals):
            if arrival.turn == turn:
                own = np.random.default_rng(index).integers(8, VOCAB, arrival.own_tokens).tolist()
                request = make_request(
                    index,
                    shared[: arrival.shared_tokens] + own,
                    arrival.max_tokens,
                    min_tokens=arrival.min_tokens,
                    priority=arrival.priority,
                    tenant=(arrival.tenant, ""),
                )
                engine.scheduler.add_request(request)
            if arrival.aborted_at == turn:
                engine.scheduler.abort_request(index)
        engine.turn()
    engine.run()
    return found.hexdigest()


def _described(plan: SchedulerOutput) -> bytes:
    """What a plan says, whatever the form of the message."""
    new = [[r.slot, r.token_ids, r.num_prompt_tokens, r.num_computed_tokens, r.block_ids[0]] for r in plan.new_reqs]
    rows = [plan.slots, plan.num_scheduled_tokens, plan.num_sampled, plan.finished_slots]
    return msgspec.msgpack.encode([plan.step_id, rows, new, list(plan.block_updates[:1]), plan.grammar_slots])


def read(path: Path) -> Trace:
    return msgspec.json.decode(path.read_bytes(), type=Trace)


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("config", CONFIGS)
def test_plans_stay_as_they_are(path: Path, config: str) -> None:
    trace = read(path)
    assert digest(trace, CONFIGS[config]) == trace.digests[config]


def _write() -> None:
    """Notes the digests of the plans as they are made now."""
    for path in sorted(TRACES.glob("*.json")):
        trace = read(path)
        trace.digests = {name: digest(trace, options) for name, options in CONFIGS.items()}
        arrivals = ",\n  ".join(json.dumps(msgspec.to_builtins(arrival)) for arrival in trace.arrivals)
        digests = json.dumps(trace.digests, indent=2)
        path.write_text(f'{{"arrivals": [\n  {arrivals}\n], "digests": {digests}}}\n')


if __name__ == "__main__":
    _write()
