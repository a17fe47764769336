"""Progress bars: of loading, shown if it takes longer than a second, and the speed of offline requests."""

from __future__ import annotations

import time
from typing import Any, NoReturn

from tqdm import tqdm

from engine_core.messages import LoadProgress


class LoadBar:
    """Shows the workers' loading progress."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def update(self, progress: LoadProgress) -> None:
        """Updates the bar from a worker's report; only rank 0 is shown."""
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


class SpeedMeter:
    """Shows tokens per second on a progress bar, in vLLM's format."""

    def __init__(self) -> None:
        self._input = self._output = 0
        self._begin = time.monotonic()

    def add(self, bar: tqdm[NoReturn], num_input: int, num_output: int) -> None:
        """Counts the tokens of a finished completion or prompt and updates the bar's text."""
        self._input += num_input
        self._output += num_output
        seconds = max(time.monotonic() - self._begin, 1e-6)
        bar.postfix = (
            f"est. speed input: {self._input / seconds:.2f} toks/s, output: {self._output / seconds:.2f} toks/s"
        )
