"""Sleep: the engine computes nothing and frees memory until it is woken.

At level 1 the workers give the memory of the KV cache back; at level 2 they end, and with them goes all else. Requests
that were running wait as if preempted, and go on when the engine wakes up.
"""

from __future__ import annotations

from collections.abc import Callable

from engine_core.messages import SleepRequest, WakeUpRequest
from engine_core.scheduler import Scheduler
from executor.base import Executor
from executor.messages import FreeKVCache

Answer = Callable[[int, str | None], None]
"""Takes the id of a call and an error, or None."""


class Sleep:
    """Whether the engine sleeps, and who waits for it to fall asleep or to wake up."""

    def __init__(self, executor: Executor, answer: Answer) -> None:
        self._executor = executor
        self._answer = answer
        self._request: SleepRequest | None = None
        self._is_asleep = False
        self._freeing: set[int] = set()
        """Ranks that have not freed their KV caches yet."""
        self._waking: list[int] = []
        """Calls to be answered once the workers are back."""
        self.is_down = False
        """There are no workers."""

    @property
    def is_wanted(self) -> bool:
        """Whether the engine sleeps or is about to."""
        return self._request is not None

    @property
    def plans(self) -> bool:
        """Whether requests that have started are computed."""
        return self._request is None or (self._request.finishes and not self._is_asleep)

    @property
    def is_waking(self) -> bool:
        """Whether workers are being loaded to end sleep."""
        return bool(self._waking)

    def handle(self, message: SleepRequest | WakeUpRequest, scheduler: Scheduler | None, *, is_serving: bool) -> bool:
        """Handles a message of the api. Returns whether workers must be started.

        Args:
            message: The message.
            scheduler: The scheduler; None: the model is not loaded.
            is_serving: There are workers that accept plans.
        """
        must_start = False
        if scheduler is None or not (is_serving or self.is_wanted):
            self._answer(message.call_id, "the workers are being loaded; try again when they are there")
            return False
        if isinstance(message, SleepRequest):
            self.begin(message)
        else:
            must_start = self.wake_up(message.call_id)
        scheduler.admits = not self.is_wanted
        return must_start

    def begin(self, request: SleepRequest) -> None:
        """Asks for sleep, or for deeper sleep; ``settle`` finds the moment."""
        if self._waking:
            self._answer(request.call_id, "the engine is waking up; try again when it is awake")
        elif self._request is not None and not self._is_asleep:
            self._answer(request.call_id, "the engine is falling asleep already")
        elif self._request is not None and request.level <= self._request.level:
            self._answer(request.call_id, None)
        else:
            self._request, self._is_asleep = request, False

    def settle(self, scheduler: Scheduler) -> bool:
        """Called while no step is in flight: falls asleep, if that is wanted and not done.

        Returns:
            Whether there are workers.
        """
        request = self._request
        is_busy = scheduler.pool.transfers is not None and not scheduler.pool.transfers.is_idle
        if request is None or self._is_asleep or self._freeing or is_busy:
            return not self.is_down
        if request.finishes and scheduler.num_running:
            return True
        (scheduler.pause if request.level == 1 else scheduler.restart)([] if request.keeps_kv else None)
        if request.level == 1 and not request.keeps_kv:
            self._freeing = set(range(self._executor.num_ranks))
            self._executor.submit(FreeKVCache())
            return True
        if request.level > 1:
            self._executor.kill()
            if not request.keeps_kv:
                self._executor.forget_memory()
            self.is_down = True
        self._fell_asleep()
        return not self.is_down

    def freed(self, rank: int) -> None:
        """Records that a rank has freed its KV cache."""
        if rank in self._freeing:
            self._freeing.discard(rank)
            if not self._freeing:
                self._fell_asleep()

    def lost_workers(self) -> None:
        """Records that new workers are coming: what the last ones were told to free is free."""
        if self._freeing:
            self._freeing.clear()
            self._fell_asleep()

    def _fell_asleep(self) -> None:
        self._is_asleep = True
        if self._request is not None:
            self._answer(self._request.call_id, None)

    def wake_up(self, call_id: int) -> bool:
        """Ends sleep. Returns whether workers must be started; ``woke_up`` is called when they are there."""
        request = self._request
        if request is not None and not self._is_asleep and not self._waking:
            self._answer(request.call_id, "the engine was woken up before it slept")
        self._is_asleep = False
        self._freeing.clear()
        if self.is_down or self._waking:
            self._waking.append(call_id)
            must_start, self.is_down = self.is_down, False
            return must_start
        self._request = None
        self._answer(call_id, None)
        return False

    def woke_up(self) -> None:
        """Records that the workers are there."""
        if self._waking:
            self._request = None
        self._end_calls(None)

    def failed(self, error: str) -> None:
        """Records that the workers could not be loaded, and were ended: the engine sleeps on."""
        self.is_down = self._is_asleep = True
        self._end_calls(error)

    def _end_calls(self, error: str | None) -> None:
        calls, self._waking = self._waking, []
        for call_id in calls:
            self._answer(call_id, error)
