"""Prefixes in a store: requests wait for them, and whatever happens, tokens are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.cache_shape import GroupShape
from engine_core.kv_transfer import transfers
from engine_core.kv_transfer.disk import DiskStore, StoreError
from engine_core.kv_transfer.transfers import KVTransfers
from executor.messages import FinishedTransfer, KVCacheGroupSpec, KVTransfer, WorkerReady, i32
from tests.null.core_harness import MAX_LEN
from tests.null.test_scheduler import Engine, expected_output, make_request, prompts

FULL = GroupShape(num_blocks=64, block_size=4)
WINDOW = GroupShape(num_blocks=64, block_size=4, window=10)


def ready(groups: tuple[GroupShape, ...], fingerprint: str = "model") -> WorkerReady:
    specs = tuple(KVCacheGroupSpec("full", group.block_size, 1000, (0,)) for group in groups)
    return WorkerReady(0, 0, 0, 0, 0, specs, MAX_LEN, 50, fingerprint=fingerprint)


class Stored:
    """An engine whose blocks are stored as a worker would: moves blocks when a test says so."""

    def __init__(
        self,
        folder: Path,
        groups: tuple[GroupShape, ...] = (FULL,),
        max_bytes: int = 1 << 30,
        fingerprint: str = "model",
        files: dict[tuple[int, bytes], Any] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        """``writes``: There are files on disk, for a later engine to find; ``files`` has what they hold."""
        self.writes = writes
        self.engine = Engine.create(groups=groups, max_num_batched_tokens=16)
        self.store = DiskStore(str(folder), max_bytes, [ready(groups, fingerprint)], {"model": "m"})
        self.transfers = KVTransfers(self.engine.scheduler.kv, self.store, 1)
        self.engine.scheduler.pool.transfers = self.transfers
        self.files = {} if files is None else files
        self.pending: list[KVTransfer] = []
        self.damaged: Callable[[bytes], bool] = lambda block_hash: False
        self.num_loaded = 0

    def collect(self) -> None:
        self.pending += self.transfers.take_messages()

    def move(self) -> bool:
        """Does the oldest transfer. Plans before it are computed."""
        self.collect()
        if not self.pending:
            return False
        while self.engine.in_flight:
            self.engine.retire()
        self.collect()
        transfer = self.pending.pop(0)
        results = []
        for block_hash, group, block in zip(
            transfer.hashes, transfer.groups, i32(transfer.block_ids).tolist(), strict=True
        ):
            blocks = self.engine.device.groups[group].blocks
            if not transfer.is_load:
                self.files[group, block_hash] = blocks[block].copy()
                if self.writes:
                    folder = self.store._folder / self.store._own / "0"
                    folder.mkdir(exist_ok=True)
                    (folder / f"{block_hash.hex()}.{group}").write_bytes(b"x" * 1064)
                results.append(1)
                continue
            found = None if self.damaged(block_hash) else self.files.get((group, block_hash))
            blocks[block] = -9 if found is None else found
            self.num_loaded += found is not None
            results.append(found is not None)
        for name in transfer.removed:
            digits, _, number = name.partition("/")[2].partition(".")
            self.files.pop((int(number), bytes.fromhex(digits)), None)
        answer = FinishedTransfer(0, transfer.transfer_id, bytes(results))
        self.transfers.finished(answer, self.engine.scheduler.waiting.put_back)
        self.engine.scheduler.check_integrity()
        return True

    def run(self) -> None:
        num_turns = 0
        while self.engine.turn() or self.move():
            self.engine.scheduler.check_integrity()
            num_turns += 1
            if num_turns % 100 == 0:  # a request starts over again and again while a transfer holds what it needs
                self.move()
            assert num_turns < 5000, "nothing makes progress"
        assert not self.engine.scheduler.has_unfinished
        assert self.engine.scheduler.kv.num_free == self.engine.scheduler.kv.num_blocks


@pytest.fixture(autouse=True)
def short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MIN_TOKENS", 8)


@pytest.mark.parametrize("groups", [(FULL,), (WINDOW, FULL), (WINDOW,)])
def test_a_new_engine_finds_what_an_earlier_one_stored(groups: tuple[GroupShape, ...], tmp_path: Path) -> None:
    first = Stored(tmp_path, groups)
    prompt = prompts(1, 33)[0]
    first.engine.scheduler.add_request(make_request(0, prompt, 12))
    first.run()
    output = expected_output(prompt, 12)
    assert first.engine.outputs[0] == output and first.files
    second = Stored(tmp_path, groups, files=first.files)
    longer = [*prompt, *output, 9, 9]
    second.engine.scheduler.add_request(make_request(0, longer, 5))
    second.engine.scheduler.add_request(make_request(1, longer, 5))  # waits for the same blocks
    second.engine.scheduler.add_request(make_request(2, prompts(1, 20, seed=4)[0], 5))  # waits for nobody
    assert second.engine.turn() and second.transfers.num_waiting == 2
    second.run()
    num_found = (len(prompt) + len(output) - 1) // 4 * 4
    assert second.engine.cached[0] == second.engine.cached[1] == num_found
    assert second.engine.outputs[0] == second.engine.outputs[1] == expected_output(longer, 5)
    other = Stored(tmp_path, groups, fingerprint="other model", files=first.files)
    other.engine.scheduler.add_request(make_request(0, longer, 5))
    other.run()
    assert not other.num_loaded and other.engine.outputs[0] == expected_output(longer, 5)


def test_salts_do_not_share_what_is_stored(tmp_path: Path) -> None:
    first = Stored(tmp_path)
    prompt = prompts(1, 33)[0]
    first.engine.scheduler.add_request(make_request(0, prompt, 2, salt="a"))
    first.run()
    second = Stored(tmp_path, files=first.files)
    for index, salt in enumerate(["", "b", "a"]):
        second.engine.scheduler.add_request(make_request(index, prompt, 2, salt=salt))
    second.run()
    assert second.engine.cached == {0: 0, 1: 0, 2: 32}


def test_a_damaged_block_is_a_miss(tmp_path: Path) -> None:
    first = Stored(tmp_path)
    prompt = prompts(1, 41)[0]
    first.engine.scheduler.add_request(make_request(0, prompt, 2))
    first.run()
    hashes = list(first.files)
    second = Stored(tmp_path, files=first.files)
    second.damaged = lambda block_hash: block_hash == hashes[5][1]
    second.engine.scheduler.add_request(make_request(0, prompt, 2))
    second.run()
    assert second.engine.cached[0] == 20 and second.engine.outputs[0] == expected_output(prompt, 2)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    stored = Stored(tmp_path, max_bytes=16 * 1064)
    inputs = [prompts(1, 33, seed=seed)[0] for seed in range(3)]
    for index in (0, 1):
        stored.engine.scheduler.add_request(make_request(index, inputs[index], 2))
        stored.run()
    stored.engine.scheduler.kv.reset_prefix_cache()
    stored.engine.scheduler.add_request(make_request(2, inputs[0], 2))
    stored.run()
    stored.engine.scheduler.add_request(make_request(3, inputs[2], 2))
    stored.run()
    assert len(stored.files) <= 16 and stored.store.num_bytes <= 16 * 1064
    stored.engine.scheduler.kv.reset_prefix_cache()
    for index, prompt in enumerate(inputs, 4):
        stored.engine.scheduler.add_request(make_request(index, prompt, 2))
    while stored.engine.turn() or stored.move():
        pass
    assert stored.engine.cached[4] == 32 and stored.engine.cached[5] < 32 and stored.engine.cached[6] == 32


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    with pytest.raises(StoreError, match="others could write there"):
        DiskStore(str(tmp_path), 1, [ready((FULL,))], {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file: Not a directory|file: File exists"):
        DiskStore(str(tmp_path / "file"), 1, [ready((FULL,))], {})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_order_of_requests_transfers_and_restarts(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([(FULL,), (WINDOW, FULL), (GroupShape(24, 4),)]))
    stored = Stored(
        tmp_path_factory.mktemp("store"), groups, max_bytes=draw(st.sampled_from([20_000, 1 << 30])), writes=False
    )
    damage = draw(st.integers(2, 9))
    stored.damaged = lambda block_hash: block_hash[0] % damage == 0
    engine = stored.engine
    shared = prompts(1, 40, seed=3)[0]
    sent: dict[int, tuple[list[int], int]] = {}
    aborted: set[int] = set()
    for index in range(draw(st.integers(1, 10))):
        prompt = shared[: draw(st.integers(0, 40))] + prompts(1, draw(st.integers(1, 20)), seed=index)[0]
        sent[index] = prompt, draw(st.integers(1, 20))
        engine.scheduler.add_request(make_request(index, *sent[index]))
        for _ in range(draw(st.integers(0, 12))):
            if not engine.turn() or draw(st.booleans()):
                stored.move()
        match draw(st.integers(0, 7)):
            case 0:
                victim = draw(st.sampled_from(sorted(sent)))
                if engine.scheduler.abort_request(victim):
                    aborted.add(victim)
            case 1:
                engine.restart()
                stored.pending.clear()
            case 2:
                stored.pending.clear()
                engine.restart_with_cache()
            case 3:
                engine.scheduler.kv.reset_prefix_cache()
        engine.scheduler.check_integrity()
    stored.run()
    for index, (prompt, max_tokens) in sent.items():
        expected = expected_output(prompt, max_tokens)
        if index in aborted:
            expected = expected[: len(engine.outputs.get(index, []))]
        assert engine.outputs.get(index, []) == expected
