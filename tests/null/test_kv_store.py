"""Blocks in files: what was written is read back, and nothing else is taken for it."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from api.cli import main
from executor.kv_transfer.disk import DiskConnector
from executor.messages import FinishedTransfer, KVTransfer

HASHES = tuple(bytes([number]) * 32 for number in range(5))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskConnector]:
    rng = np.random.default_rng(0)
    groups = [[rng.integers(0, 256, (8, 96), np.uint8) for _ in range(1100)], [rng.integers(0, 256, (8, 5), np.uint8)]]
    connector = DiskConnector(str(tmp_path / "digest"), 0, groups)
    yield connector
    connector.close()


def transfer(*block_ids: int, is_load: bool, groups: bytes = bytes(5), removed: tuple[str, ...] = ()) -> KVTransfer:
    count = len(block_ids)
    return KVTransfer(1, is_load, HASHES[:count], groups[:count], np.array(block_ids, np.int32).tobytes(), removed)


def finish(store: DiskConnector) -> list[int]:
    """Waits for a transfer. Whether each block was moved."""
    assert select.select([store.fileno()], [], [], 30)[0]
    (finished,) = store.get_finished()
    assert isinstance(finished, FinishedTransfer) and finished.transfer_id == 1
    return list(finished.succeeded)


def test_blocks_come_back_to_any_place(store: DiskConnector, tmp_path: Path) -> None:
    mixed = bytes([0, 1, 0, 1, 0])
    before = [[tensor.copy() for tensor in group] for group in store._groups]
    store.save_kv_layer(transfer(0, 1, 2, 3, 4, is_load=False, groups=mixed))
    assert finish(store) == [1] * 5
    store.start_load_kv(transfer(4, 0, 5, 6, 7, is_load=True, groups=mixed))
    assert finish(store) == [1] * 5
    for group, own in enumerate(store._groups):
        for source, target in zip(range(5), (4, 0, 5, 6, 7), strict=True):
            if mixed[source] == group:
                assert all(
                    (tensor[target] == old[source]).all() for tensor, old in zip(own, before[group], strict=True)
                )
    files = sorted((tmp_path / "digest" / "0").iterdir())
    assert [file.name for file in files] == [f"{key.hex()}.{group}" for key, group in zip(HASHES, mixed, strict=True)]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    store.save_kv_layer(
        transfer(5, is_load=False, removed=(f"digest/{files[1].name}", "digest/none.0", "other/none.0"))
    )
    assert finish(store) == [1] and not files[1].exists()


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def rename(data: bytes) -> bytes:
    return data[:8] + HASHES[4] + data[40:]


@pytest.mark.parametrize("damage", [cut, flip, rename, lambda data: b"", lambda data: data + b"x"])
def test_damaged_files_are_misses_and_are_removed(
    store: DiskConnector, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store.save_kv_layer(transfer(0, 1, 2, is_load=False))
    assert finish(store) == [1] * 3
    path = tmp_path / "digest" / "0" / f"{HASHES[1].hex()}.0"
    path.write_bytes(damage(path.read_bytes()))
    store.start_load_kv(transfer(4, 5, 6, is_load=True))
    assert finish(store) == [1, 0, 1] and not path.exists()


def test_a_folder_that_cannot_be_written_fails_and_one_that_was_cleared_is_made_again(
    store: DiskConnector, tmp_path: Path
) -> None:
    (tmp_path / "digest" / "0").rmdir()
    store.save_kv_layer(transfer(0, is_load=False))
    assert finish(store) == [1]
    os.remove(tmp_path / "digest" / "0" / f"{HASHES[0].hex()}.0")
    (tmp_path / "digest" / "0").rmdir()
    (tmp_path / "digest" / "0").write_text("")
    store.save_kv_layer(transfer(0, is_load=False))
    assert finish(store) == [0]
    store.start_load_kv(transfer(0, is_load=True))
    assert finish(store) == [0]


def test_the_command_shows_and_clears(store: DiskConnector, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.save_kv_layer(transfer(0, 1, is_load=False))
    assert finish(store) == [1, 1]
    (tmp_path / "digest" / "about.json").write_text('{"model": "some/model", "dtype": "bfloat16"}')
    assert main(["cache", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 blocks" in shown and "some/model" in shown and "bfloat16" in shown
    assert main(["cache", "clear", str(tmp_path), "--model", "other"]) == 0
    assert "removed 0 blocks" in capsys.readouterr().out
    assert main(["cache", "clear", str(tmp_path)]) == 0
    assert "removed 2 blocks" in capsys.readouterr().out and not (tmp_path / "digest").exists()
    assert main(["cache", "show", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
