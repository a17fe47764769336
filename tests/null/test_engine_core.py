"""The loop of the engine core with workers that do as they are told: it loses no request, whatever they do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine_core import admission, validation
from engine_core.messages import (
    MAX_OUTPUTS,
    POOLING_TYPES,
    AbortRequests,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineDead,
    EngineReady,
    FinishReason,
    LoRARequest,
    MultiModalFeature,
    Ping,
    ResetPrefixCache,
    ResolvedParams,
    ResolvedPoolingParams,
    SchedulerStats,
    Shutdown,
    SiblingRequests,
    StatusRequest,
    ToEngineCore,
    UtilityOutput,
    to_array,
)
from engine_core.process import REQUESTS_PER_TURN, ZmqTransport
from executor.messages import (
    EXIT_MODEL,
    KVCacheGroupSpec,
    KVCacheReady,
)
from tests.null.core_harness import (
    BLOCK_SIZE,
    GROUPS,
    HIDDEN_SIZE,
    MAX_LEN,
    NUM_BLOCKS,
    PROMPT,
    VOCAB,
    Harness,
    expected,
    make_request,
    prompts,
    worker_ready,
)

# -- life -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_requests_are_served(depth: int) -> None:
    harness = Harness(depth=depth)
    for index, prompt in enumerate(prompts(9)):
        harness.add(index, prompt)
    harness.run_to_the_end()
    (ready,) = harness.messages(EngineReady)
    assert (ready.max_model_len, ready.vocab_size, ready.num_kv_blocks) == (MAX_LEN, VOCAB, NUM_BLOCKS)
    assert ready.weight_bytes == 1000 * harness.executor.num_ranks
    assert harness.outputs == {index: expected(prompt) for index, prompt in enumerate(prompts(9))}
    assert harness.stats.num_running_reqs == 0 and harness.stats.kv_cache_usage == 0


def test_pooling_requests_are_served_beside_others() -> None:
    harness = Harness()
    harness.inbox.append(make_request(1, params=None, pooling_params=ResolvedPoolingParams(dimensions=3)))
    harness.add(2)
    harness.inbox.append(make_request(3, prompts(1)[0], params=None, pooling_params=ResolvedPoolingParams()))
    harness.inbox.append(AbortRequests((3,)))
    harness.run_to_the_end()
    (output,) = (
        output
        for message in harness.messages(EngineCoreOutputs)
        for output in message.outputs
        if output.pooling_output is not None
    )
    assert output.index == 1 and output.finish_reason == FinishReason.STOP and output.num_cached_tokens == 0
    assert to_array(output.pooling_output).tolist() == [*PROMPT, len(PROMPT)]
    assert harness.outputs[2] == expected()
    (ready,) = harness.messages(EngineReady)
    assert ready.hidden_size == HIDDEN_SIZE


@pytest.mark.parametrize(
    ("problem", "fields"),
    [
        ("dimensions", {"pooling_params": ResolvedPoolingParams(dimensions=HIDDEN_SIZE + 1)}),
        ("dimensions", {"pooling_params": ResolvedPoolingParams(dimensions=0)}),
        ("pooling_type", {"pooling_params": ResolvedPoolingParams(pooling_type="MEAN+ALL")}),
        ("num_attended", {"pooling_params": ResolvedPoolingParams(num_attended=1)}),
        ("not both", {"pooling_params": ResolvedPoolingParams(), "params": ResolvedParams()}),
        ("not both", {"pooling_params": ResolvedPoolingParams(), "resumed_output_token_ids": b"\1\0\0\0"}),
        ("maximum context", {"pooling_params": ResolvedPoolingParams(), "prompt": [9] * (MAX_LEN + 1)}),
    ],
)
def test_pooling_requests_that_make_no_sense(problem: str, fields: dict[str, Any]) -> None:
    harness = Harness()
    harness.inbox.append(make_request(1, **{"params": None, **fields}))
    harness.run_to_the_end()
    assert harness.reasons == {1: FinishReason.ERROR} and problem in (harness.errors[1] or "")


def test_it_ends_with_the_api() -> None:
    harness = Harness()
    harness.executor.shutdown()
    harness.api_is_gone = True
    assert harness.core.run() == 0
    assert not harness.executor.is_up


@pytest.mark.parametrize("drain", [False, True])
def test_shutdown(drain: bool) -> None:
    harness = Harness()
    harness.add(0)
    harness.turns(4)
    harness.inbox.append(Shutdown(drain=drain))
    harness.run()
    assert harness.core.exit_code == 0
    assert (harness.outputs.get(0) == expected()) == drain


def test_control_messages_are_answered_while_the_model_loads_and_while_a_step_takes_long() -> None:
    harness = Harness()
    harness.executor.loads_by_itself = False
    harness.executor.inbox.clear()
    harness.inbox += [Ping(1), StatusRequest(2), ResetPrefixCache(3)]
    harness.run()
    assert [answer.call_id for answer in harness.messages(UtilityOutput)] == [1, 2, 3]

    harness = Harness()
    harness.executor.computes = False
    harness.add(0, max_tokens=3)
    harness.run()
    assert len(harness.core.in_flight) == 2
    harness.inbox += [Ping(4), StatusRequest(5)]
    harness.run()
    ping, status = harness.messages(UtilityOutput)
    assert ping.call_id == 4 and status.result["steps_in_flight"] == 2 and status.result["integrity"] == ""
    harness.executor.computes = True
    harness.run_to_the_end()


def test_requests_that_come_early_wait_for_the_model() -> None:
    harness = Harness()
    harness.executor.loads_by_itself = False
    harness.executor.inbox.clear()
    harness.add(0, prompts(6)[0])
    harness.add(1, prompts(6)[1])
    harness.run()
    harness.executor.inbox.append([worker_ready()])
    harness.run()
    # The cache is planned, but the workers have not allocated it.
    harness.add(2, prompts(6)[2])
    harness.add(3, prompts(6)[3])
    harness.inbox.append(AbortRequests((1, 3)))
    harness.run()
    assert not harness.outputs
    harness.executor.inbox.append([KVCacheReady(0)])
    harness.run_to_the_end()
    assert harness.outputs == {index: expected(prompts(6)[index]) for index in (0, 2)}
    assert harness.errors == {0: None, 2: None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 3}, "does not fit the KV cache"),
        ({"max_model_len": MAX_LEN + 1}, "exceeds the model's maximum of"),
    ],
)
def test_a_cache_that_does_not_fit_is_fatal(options: dict[str, Any], message: str) -> None:
    harness = Harness(**options)
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert message in dead.message and dead.exit_code == harness.core.exit_code == EXIT_MODEL


def test_a_model_without_a_cache_is_served() -> None:
    harness = Harness(groups=(), max_num_seqs=2)
    for index, prompt in enumerate(prompts(5)):
        harness.add(index, prompt, params=None, pooling_params=ResolvedPoolingParams(pooling_type="MEAN"))
    harness.run_to_the_end()
    (ready,) = harness.messages(EngineReady)
    assert (ready.num_kv_blocks, ready.max_model_len) == (0, MAX_LEN)
    assert harness.reasons == dict.fromkeys(range(5), FinishReason.STOP)
    assert harness.core._status()["integrity"] == ""


def test_groups_with_and_without_a_window_are_served() -> None:
    window = KVCacheGroupSpec(
        kind="sliding_window", block_size=BLOCK_SIZE, bytes_per_block=2, layers=(1,), sliding_window=6
    )
    harness = Harness(groups=(*GROUPS, window), max_num_seqs=2)
    for index, prompt in enumerate(prompts(5)):
        harness.add(index, prompt, 30)
    harness.run_to_the_end()
    (ready,) = harness.messages(EngineReady)
    # Six blocks are what a request sees and a step, wherever that begins; two run.
    assert (ready.num_kv_blocks, ready.block_size) == (40, BLOCK_SIZE)
    scheduler = harness.core._scheduler
    assert scheduler is not None and [group.num_blocks for group in scheduler.shape.groups] == [40, 12]
    assert harness.outputs == {index: expected(prompt, 30) for index, prompt in enumerate(prompts(5))}


def test_no_room_for_a_cache_is_fatal() -> None:
    harness = Harness()
    harness.executor.inbox[0] = [worker_ready(num_blocks=0)]
    harness.run()
    (dead,) = harness.messages(EngineDead)
    assert "no memory for a KV cache" in dead.message and harness.core.exit_code == EXIT_MODEL


# -- hostile requests -----------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from(
        [-(2**63), -(2**31) - 1, -2, -1, 0, 1, VOCAB - 1, VOCAB, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1]
    ),
    st.integers(-(2**63), 2**64 - 1),
)
FLOATS = st.one_of(st.sampled_from([float("nan"), float("inf"), -1.0, 0.0, 1e-300, 1e39, 1e308]), st.floats())
TOKEN_LISTS = st.lists(NUMBERS, max_size=12).map(tuple)
COLUMNS = st.one_of(
    st.binary(max_size=40),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=12).map(lambda ids: np.array(ids, np.int32).tobytes()),
    st.lists(st.integers(0, VOCAB - 1), max_size=80).map(lambda ids: np.array(ids, np.int32).tobytes()),
)
PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": FLOATS,
    "top_k": NUMBERS,
    "top_p": FLOATS,
    "min_p": FLOATS,
    "seed": NUMBERS,
    "presence_penalty": FLOATS,
    "frequency_penalty": FLOATS,
    "repetition_penalty": FLOATS,
    "max_tokens": NUMBERS,
    "min_tokens": NUMBERS,
    "stop_token_ids": TOKEN_LISTS,
    "eos_token_ids": TOKEN_LISTS,
    "logit_bias": st.lists(st.tuples(NUMBERS, FLOATS), max_size=3).map(tuple),
    "allowed_token_ids": TOKEN_LISTS,
    "bad_words_token_ids": st.lists(TOKEN_LISTS, max_size=3).map(tuple),
    "logprobs": NUMBERS,
    "prompt_logprobs": NUMBERS,
    "logprob_token_ids": TOKEN_LISTS,
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "request_id": st.text(max_size=5),
    "index": NUMBERS,
    "prompt_token_ids": COLUMNS,
    "sampling_params": st.none(),
    "pooling_params": st.builds(
        ResolvedPoolingParams,
        pooling_type=st.one_of(st.sampled_from(POOLING_TYPES), st.text(max_size=3)),
        dimensions=st.one_of(st.none(), NUMBERS),
    ),
    "arrival_time": FLOATS,
    "priority": NUMBERS,
    "lora_request": st.builds(LoRARequest, name=st.text(max_size=3), lora_id=NUMBERS, path=st.text(max_size=3)),
    "mm_features": st.lists(st.builds(MultiModalFeature, st.text(max_size=3), NUMBERS, NUMBERS), max_size=2).map(tuple),
    "cache_salt": st.text(max_size=5),
    "resumed_output_token_ids": COLUMNS,
}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), policy=st.sampled_from(["fcfs", "priority"]))
def test_hostile_fields_fail_only_their_request(data: st.DataObject, policy: str) -> None:
    """One or two fields of a request have any value that a socket can bring; those beside it notice nothing."""
    harness = Harness(policy=policy)
    harness.run()
    canaries = {1_000_001: PROMPT, 1_000_002: [30, 31, 32]}
    harness.add(1_000_001)
    used = set(canaries)
    harness.turns(data.draw(st.integers(0, 4)))
    for index in (2_000_001, 2_000_002):
        bad_params = data.draw(st.sets(st.sampled_from(sorted(PARAMS)), max_size=2))
        bad_fields = data.draw(st.sets(st.sampled_from(sorted(FIELDS)), min_size=not bad_params, max_size=2))
        params = {"max_tokens": 6} | {name: data.draw(PARAMS[name], name) for name in sorted(bad_params)}
        request = make_request(index, params=ResolvedParams(**params))
        request = msgspec.structs.replace(
            request, **{name: data.draw(FIELDS[name], name) for name in sorted(bad_fields)}
        )
        try:
            received = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ToEngineCore)
        except (msgspec.MsgspecError, UnicodeEncodeError):
            assume(False)  # the socket does not let it through
        assert isinstance(received, EngineCoreRequest)
        assume(received.index not in used)
        used.add(received.index)
        harness.inbox.append(received)
        harness.turns(1)
    harness.add(1_000_002, canaries[1_000_002])
    harness.run_to_the_end()
    assert harness.executor.lives == 1
    for index, prompt in canaries.items():
        assert harness.outputs[index] == expected(prompt) and harness.errors[index] is None


def test_an_index_that_is_taken_does_not_end_its_owner() -> None:
    harness = Harness()
    harness.add(1)
    harness.turns(4)
    harness.add(1, [20, 21])
    harness.run_to_the_end()
    assert harness.outputs == {1: expected()} and harness.errors == {1: None}


def siblings(first: Any, indices: list[int]) -> ToEngineCore:
    message = SiblingRequests(
        first=first,
        request_ids=tuple(map(str, indices)),
        indices=np.array(indices, np.int64).tobytes(),
        seeds=tuple(indices),
    )
    received: ToEngineCore = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToEngineCore)
    return received


def test_siblings_share_their_prompt_and_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def request_problem(request: Any, *args: Any, **options: Any) -> str | None:
        checked.append(request.index)
        return validation.request_problem(request, *args, **options)

    monkeypatch.setattr(admission, "request_problem", request_problem)
    harness = Harness()
    harness.run()  # the model is loaded
    harness.inbox.append(siblings(make_request(1), [1, 2, 3, 4, 5, 6]))
    harness.turns(1)
    scheduler = harness.core._scheduler
    assert scheduler is not None
    requests = list(scheduler.requests.values())
    assert [request.params.seed for request in requests] == [1, 2, 3, 4, 5, 6]
    assert len({request.token_ids.__array_interface__["data"][0] for request in requests}) == 1
    harness.run_to_the_end()
    assert checked == [1]
    assert harness.outputs == {index: expected() for index in range(1, 7)}


@pytest.mark.parametrize("first", [{"prompt_token_ids": b""}, {"sampling_params": None, "prompt_token_ids": b""}])
def test_bad_siblings_harm_nobody(first: dict[str, Any]) -> None:
    harness = Harness()
    harness.add(9)
    harness.turns(4)
    harness.inbox.append(siblings(msgspec.structs.replace(make_request(1), **first), [1, 2]))
    harness.run_to_the_end()
    assert harness.outputs[9] == expected() and harness.errors[9] is None
    assert harness.errors[1] is not None and harness.errors[2] is not None


# -- the socket -----------------------------------------------------------------------------------------------


@pytest.fixture
def transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ZmqTransport, zmq.Socket[bytes], int]]:
    """A transport, the api's end of it, and the api's end of the start pipe."""
    reader, writer = os.pipe()
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/api")
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        core_side = ZmqTransport(f"ipc://{tmp_path}/api", b"engine_core.1")
        core_side.send(EngineDead(1, "hello"))
        router.recv_multipart()
        yield core_side, router, writer
        core_side.close()
    router.close(linger=0)
    context.term()
    os.close(writer)


def test_frames_that_are_no_messages_are_dropped(transport: tuple[ZmqTransport, zmq.Socket[bytes], int]) -> None:
    core_side, router, _ = transport
    good = msgspec.msgpack.encode(make_request(1))
    for frame in (b"", b"\xc1", good[:-1], good.replace(b"request-1", b"\xff" * 9), msgspec.msgpack.encode([]), good):
        router.send_multipart((b"engine_core.1", frame))
    received: list[ToEngineCore] = []
    while not received:
        received += core_side.wait([], 1.0) or []
    assert received == [make_request(1)]


def test_many_requests_are_taken_in_turns(transport: tuple[ZmqTransport, zmq.Socket[bytes], int]) -> None:
    core_side, router, _ = transport
    for number in range(2 * REQUESTS_PER_TURN):
        router.send_multipart((b"engine_core.1", msgspec.msgpack.encode(make_request(number))))
    sizes: list[int] = []
    while sum(sizes) < 2 * REQUESTS_PER_TURN:
        messages = core_side.wait([], 1.0)
        assert messages
        sizes.append(len(messages))
    assert max(sizes) <= REQUESTS_PER_TURN


def test_outputs_of_a_step_travel_in_pieces() -> None:
    stats = SchedulerStats(num_running_reqs=7)
    outputs = tuple(EngineCoreOutput(index, 0) for index in range(2 * MAX_OUTPUTS + 1))
    columns = b"12345678", b"1234", b"1234"
    for count, sizes in ((0, [0]), (1, [1]), (64, [64]), (65, [64, 1]), (129, [64, 64, 1]), (128, [64, 64])):
        pieces = list(EngineCoreOutputs(1, *columns, outputs[:count], stats, 2.0).pieces())
        assert [len(piece.outputs) for piece in pieces] == sizes
        assert sum((piece.outputs for piece in pieces), ()) == outputs[:count]
        *others, last = pieces
        assert (last.indices, last.output_indices, last.token_ids, last.scheduler_stats) == (*columns, stats)
        assert all(not piece.indices and piece.scheduler_stats is None for piece in others)
        assert {(piece.engine_epoch, piece.timestamp) for piece in pieces} == {(1, 2.0)}


def test_the_end_of_the_api_is_noticed(transport: tuple[ZmqTransport, zmq.Socket[bytes], int]) -> None:
    core_side, _, writer = transport
    assert core_side.wait([], 0) == []
    os.close(os.dup(writer))
    assert core_side.wait([], 0) == []
    os.dup2(os.open(os.devnull, os.O_RDONLY), writer)
    assert core_side.wait([], 5.0) is None
