"""Which adapters are in the workers' memory, and which requests wait for one.

Workers hold up to ``max_loaded`` adapters, by number; the one unused for longest makes room. The requests that run at
the same time have at most ``max_running`` different ones, since each adds its own weights to what a step reads.
Requests that cannot start for one of these reasons are parked outside the queue, and others pass them. If many have
passed the oldest, no more requests start with one of the adapters that run, until its place is free.

Adapters are identified by the hash of their content. Names are the api's affair.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from engine_core.config import LoRAConfig
from engine_core.messages import LoRARequest, SchedulerStats
from engine_core.request import Request
from executor.messages import AdapterLoaded, LoadAdapter, UnloadAdapter

PATIENCE = 16
"""Requests with other adapters that may start before the oldest one that is parked gets a place."""
ABANDONED = "the workers died repeatedly while they loaded the adapter"
"""The answer to the api if that was so."""


@dataclass
class Loaded:
    """An adapter that has a number."""

    adapter: LoRARequest
    number: int
    is_ready: bool = False
    """All workers have it."""
    is_forgotten: bool = False
    """Nobody can ask for it any more."""
    num_running: int = 0
    """Requests that run with it."""
    claims: set[int] = field(default_factory=set)
    """Indices of requests that were parked and are at the front of the queue now: it must not make room again."""


@dataclass
class Outcome:
    """What the answer of the workers to a load means."""

    calls: list[int]
    """Calls of the api that waited for it."""
    failed: list[Request] = field(default_factory=list)
    """Parked requests that cannot run."""
    error: str = ""


def _names(adapters: Iterable[LoRARequest]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(adapter.name for adapter in adapters))


class AdapterPool:
    """The adapters of one engine core. Decides by the order of requests alone."""

    def __init__(self, config: LoRAConfig, num_ranks: int = 1) -> None:
        self.max_running = config.max_loras
        self.max_loaded = config.max_loaded
        self.num_ranks = num_ranks
        self.commands: list[LoadAdapter | UnloadAdapter] = []
        """What the workers must do before the next plan."""
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        """By hash, the least recently used first."""
        self._parked: OrderedDict[str, OrderedDict[int, Request]] = OrderedDict()
        """By hash, the adapter whose requests have waited for longest first."""
        self._calls: dict[str, list[int]] = {}
        """Calls of the api that wait for an adapter to be loaded or tried, by hash."""
        self._tried: dict[str, LoRARequest] = {}
        self._answers: dict[tuple[int, str], list[str]] = {}
        self._repeated: set[int] = set()
        """Of these calls, those during which workers died once."""
        self._abandoned: list[int] = []
        """Those during which they died again."""
        self._num_passed = 0
        """Requests with other adapters that have started since the oldest parked one was parked."""
        self._drained = ""
        """The adapter that must make room."""

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def num_parked(self) -> int:
        return sum(map(len, self._parked.values()))

    @property
    def num_loaded(self) -> int:
        return len(self._loaded)

    @property
    def is_full(self) -> bool:
        """Whether requests run with as many adapters as fit in memory."""
        return sum(each.num_running > 0 for each in self._loaded.values()) == self.max_loaded

    def number(self, request: Request) -> int:
        """The number of a request's adapter in plans; 0: it has none."""
        adapter = request.message.lora_request
        return 0 if adapter is None else self._loaded[adapter.content_hash].number

    def noted(self, stats: SchedulerStats) -> SchedulerStats:
        """The statistics with those of adapters."""
        if not self._loaded and not self._parked:
            return stats
        waiting = [next(iter(parked.values())).message.lora_request for parked in self._parked.values()]
        return msgspec.structs.replace(
            stats,
            # One may be there with several scales.
            running_adapters=_names(each.adapter for each in self._loaded.values() if each.num_running),
            waiting_adapters=_names(adapter for adapter in waiting if adapter is not None),
            num_loaded_adapters=len(self._loaded),
        )

    # -- requests ------------------------------------------------------------------------------------------

    def may_start(self, request: Request, *, is_alone: bool = False) -> bool:
        """Whether a request can start now. If its adapter is not in memory, it is loaded as soon as there is room.

        Args:
            request: The request.
            is_alone: It runs while all others pause.
        """
        adapter = request.message.lora_request
        if adapter is None:
            return True
        key = adapter.content_hash
        if key not in self._loaded and not self._load(adapter, is_alone=is_alone):
            return False
        return self._is_open(key, is_alone=is_alone)

    def _is_open(self, key: str, *, is_alone: bool = False) -> bool:
        """Whether requests with a loaded adapter may start."""
        loaded = self._loaded[key]
        if not loaded.is_ready or (key == self._drained and not is_alone):
            return False
        num_running = sum(each.num_running > 0 for each in self._loaded.values())
        return is_alone or loaded.num_running > 0 or num_running < self.max_running

    def park(self, request: Request) -> None:
        """Takes over a request that may not start."""
        adapter = request.message.lora_request
        assert adapter is not None
        self._drop_claim(request)
        self._parked.setdefault(adapter.content_hash, OrderedDict())[request.index] = request

    def _drop_claim(self, request: Request) -> None:
        adapter = request.message.lora_request
        if adapter is not None and adapter.content_hash in self._loaded:
            self._loaded[adapter.content_hash].claims.discard(request.index)

    def forget_request(self, request: Request) -> bool:
        """Drops a request that does not run. Returns False if it is not parked."""
        self._drop_claim(request)
        adapter = request.message.lora_request
        key = "" if adapter is None else adapter.content_hash
        parked = self._parked.get(key)
        if parked is None or parked.pop(request.index, None) is None:
            return False
        if not parked:
            self._remove_parked(key)
            self._unload_forgotten(key)
        return True

    def _remove_parked(self, key: str) -> None:
        is_oldest = next(iter(self._parked)) == key
        del self._parked[key]
        if is_oldest:
            self._num_passed, self._drained = 0, ""

    def take_ready(self) -> list[Request]:
        """The parked requests that may start now; they go back to the front of the queue, in this order."""
        ready: list[Request] = []
        room = self.max_running - sum(each.num_running > 0 for each in self._loaded.values())
        for key, parked in list(self._parked.items()):
            adapter = next(iter(parked.values())).message.lora_request
            assert adapter is not None
            if key not in self._loaded and not self._load(adapter):
                continue
            loaded = self._loaded[key]
            if not loaded.is_ready or key == self._drained or (loaded.num_running == 0 and room <= 0):
                continue
            room -= loaded.num_running == 0
            self._remove_parked(key)
            loaded.claims |= parked.keys()
            ready += parked.values()
        return ready

    def unpark_all(self) -> list[Request]:
        """All parked requests, in the order in which they were parked by adapter."""
        parked, self._parked = self._parked, OrderedDict()
        self._num_passed, self._drained = 0, ""
        return [request for requests in parked.values() for request in requests.values()]

    def started(self, request: Request) -> None:
        """A request got a slot."""
        adapter = request.message.lora_request
        if adapter is None:
            return
        key = adapter.content_hash
        self._drop_claim(request)
        self._loaded[key].num_running += 1
        self._loaded.move_to_end(key)
        if self._parked and key != next(iter(self._parked)):
            self._num_passed += 1
            if self._num_passed >= PATIENCE and not self._drained:
                self._drained = self._choose_drained()

    def _choose_drained(self) -> str:
        """Of the adapters that run, the one with the fewest requests, which is free first."""
        oldest = next(iter(self._parked))
        running = {key: each.num_running for key, each in self._loaded.items() if each.num_running and key != oldest}
        return min(running, key=lambda key: running[key], default="")

    def stopped(self, request: Request) -> bool:
        """A request gave up its slot. Returns whether parked requests may start."""
        adapter = request.message.lora_request
        if adapter is None:
            return False
        loaded = self._loaded[adapter.content_hash]
        loaded.num_running -= 1
        if loaded.num_running:
            return False
        self._unload_forgotten(adapter.content_hash)
        return bool(self._parked)

    # -- loading -------------------------------------------------------------------------------------------

    def _load(self, adapter: LoRARequest, *, is_alone: bool = False) -> bool:
        """Asks the workers to load an adapter, if there is room. One that no request runs with makes room."""
        number = self._free_number(is_alone=is_alone)
        if not number:
            return False
        self._loaded[adapter.content_hash] = Loaded(adapter, number)
        self.commands.append(LoadAdapter(number, adapter))
        return True

    def _free_number(self, *, is_alone: bool) -> int:
        """A number to load an adapter into; 0: there is none. For a request that runs alone, those with a claim make
        room, too: they cannot start before it ends."""
        used = {each.number for each in self._loaded.values()}
        free = next((number for number in range(1, self.max_loaded + 1) if number not in used), 0)
        if free:
            return free
        for key, each in self._loaded.items():
            if each.is_ready and not each.num_running and (is_alone or not each.claims):
                del self._loaded[key]
                return each.number
        return 0

    def ensure(self, call_id: int, adapter: LoRARequest) -> bool:
        """Loads an adapter that the api has been asked for, or tries it if there is no room.

        Returns:
            Whether it is in memory already; otherwise an ``Outcome`` will have the call.
        """
        key = adapter.content_hash
        loaded = self._loaded.get(key)
        if loaded is not None:
            loaded.is_forgotten = False
            if loaded.is_ready:
                return True
        elif key not in self._tried and not self._load(adapter):
            self._tried[key] = adapter
            self.commands.append(LoadAdapter(0, adapter))
        self._calls.setdefault(key, []).append(call_id)
        return False

    def forget(self, key: str) -> None:
        """Frees the memory of an adapter once no request needs it."""
        if key in self._loaded:
            self._loaded[key].is_forgotten = True
            self._unload_forgotten(key)

    def _unload_forgotten(self, key: str) -> None:
        loaded = self._loaded.get(key)
        if loaded is None or not loaded.is_forgotten or not loaded.is_ready or loaded.num_running or loaded.claims:
            return
        if key not in self._parked:
            del self._loaded[key]
            self.commands.append(UnloadAdapter(loaded.number))

    def answered(self, message: AdapterLoaded) -> Outcome | None:
        """A worker has loaded or tried an adapter. Returns what follows once all have."""
        key = message.content_hash
        answers = self._answers.setdefault((message.number, key), [])
        answers.append(message.error)
        if len(answers) < self.num_ranks:
            return None
        del self._answers[message.number, key]
        outcome = Outcome(self._calls.pop(key, []), error=next(filter(None, answers), ""))
        self._repeated.difference_update(outcome.calls)
        if not message.number:
            self._tried.pop(key, None)
            return outcome
        loaded = self._loaded[key]
        loaded.is_ready = True
        if outcome.error:
            del self._loaded[key]
            outcome.failed = list(self._parked.get(key, {}).values())
        else:
            self._unload_forgotten(key)
        return outcome

    def restart(self) -> None:
        """Adapts to new workers, which have no adapters. All requests that ran have stopped.

        What the api asked for is tried once more, not for ever: an adapter may be why workers die.
        """
        known = {key: each.adapter for key, each in self._loaded.items()} | self._tried
        calls, self._calls = self._calls, {}
        self._loaded.clear()
        self._tried.clear()
        self._answers.clear()
        self.commands.clear()
        for key, waiting in calls.items():
            for call_id in waiting:
                if call_id in self._repeated:
                    self._repeated.discard(call_id)
                    self._abandoned.append(call_id)
                else:
                    self._repeated.add(call_id)
                    self.ensure(call_id, known[key])

    def take_abandoned(self) -> list[int]:
        """Calls of the api during which workers died repeatedly, each once."""
        calls, self._abandoned = self._abandoned, []
        return calls

    def check_integrity(self, running: list[Request]) -> None:
        """Asserts that counts and numbers agree with the requests that run."""
        counts: dict[str, int] = {}
        for request in running:
            if request.message.lora_request is not None:
                key = request.message.lora_request.content_hash
                counts[key] = counts.get(key, 0) + 1
        assert counts == {key: each.num_running for key, each in self._loaded.items() if each.num_running}
        numbers = [each.number for each in self._loaded.values()]
        assert len(set(numbers)) == len(numbers) <= self.max_loaded
        assert all(self._loaded[key].is_ready for key in counts)
