"""The seam to stores of K and V outside the cache: the worker's half of a connector.

Named after vLLM's connectors. The engine core's half (``engine_core/kv_transfer``) says what a store holds
(``get_num_new_matched_tokens``) and reserves blocks; the worker's half moves them, beside the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from executor.messages import FinishedTransfer, KVTransfer

Blocks = Sequence[npt.NDArray[np.uint8]]
"""One uint8 [num_blocks, bytes] for each tensor of a KV cache group."""


class KVConnector(Protocol):
    """Moves blocks between the KV cache and a store. Nothing here waits."""

    def fileno(self) -> int:
        """Becomes readable when ``get_finished`` has something."""

    def start_load_kv(self, transfer: KVTransfer) -> None:
        """Begins to fill blocks, which no plan uses before the transfer is finished."""

    def save_kv_layer(self, transfer: KVTransfer) -> None:
        """Begins to store blocks, with all their layers; no plan writes them before the transfer is finished."""

    def get_finished(self) -> list[FinishedTransfer]:
        """The transfers that are done since the last call."""

    def close(self) -> None:
        """Waits for what has begun; drops the rest."""


REGISTRY = {"disk": "executor.kv_transfer.disk:DiskConnector"}


class ConnectorFactory(Protocol):
    def __call__(self, store: str, rank: int, groups: Sequence[Blocks]) -> KVConnector: ...
