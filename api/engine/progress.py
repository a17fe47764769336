"""A progress bar for what takes longer than a second."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from engine_core.messages import LoadProgress


class LoadBar:
    """Shows how far the workers are with loading."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def update(self, progress: LoadProgress) -> None:
        """Takes what a worker says; the first one speaks for all."""
        if progress.rank or not self._enabled:
            return
        bar = self._bar
        if bar is None or progress.stage != self._stage:
            self.close()
            self._stage = progress.stage
            bar = self._bar = tqdm(
                total=progress.total,
                desc=f"Loading {progress.stage}",
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                delay=1.0,
                leave=False,
            )
        bar.update(progress.done - bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
