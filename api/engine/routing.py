"""Chooses the engine of a request among several that serve the same model.

Locality and load are weighed in one unit, tokens of work: what an engine would have to compute before the request's
first token. A prefix in an engine's cache saves as many tokens as it has; requests that wait there cost as many as
their prompts lack. So a common prefix stays where it is until its engine has more to do than computing it again costs,
and no threshold decides between the two. What is computed again costs more if all engines are busy with prompts, since
it delays those who come later, too.

What an engine has cached is known exactly enough without asking it: the hashes of a prompt's blocks are those that the
engine looks up (``engine_core/hashing.py``), and the cache forgets the least recently used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine_core.hashing import block_hashes, feature_keys, root_hash
from engine_core.messages import I32, MultiModalFeature
from engine_core.snapshots import Snapshots

RUNNING_COST = 32.0
"""Tokens of work that a running request stands for: it takes a row of each step in which another's prompt is computed,
and a slot."""
MAX_BLOCKS = 4096
"""Blocks of a sequence that are hashed, which takes up to seven milliseconds of the event loop. Longer ones are told
apart by their beginnings."""
CROWDED_COST = 3.0
"""Tokens of work that a prompt's own tokens stand for, beside themselves, if each engine has as much to compute as the
prompt is long; less if one has less. From simulations of requests with common prefixes."""
CONTEXT_COST = 1 / 64
"""Tokens of work per token of a running request's context, which each step reads."""


class Prefix(NamedTuple):
    """What identifies a prompt in a prefix cache."""

    num_tokens: int
    """Tokens of the prompt."""
    root: bytes = b""
    """The hash before its first block; empty: prompts are not cached."""
    hashes: Sequence[bytes] = ()
    """Of its full blocks."""


class PrefixIndex:
    """The block hashes that an engine has cached, as far as its requests tell."""

    def __init__(self, capacity: int) -> None:
        """``capacity`` is the number of blocks in the engine's cache."""
        self._capacity = capacity
        self._hashes: dict[bytes, bool] = {}
        """Least recently used first; whether a cached prefix may end there."""

    def __len__(self) -> int:
        return len(self._hashes)

    def longest(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading hashes are those of a cached prefix."""
        longest = 0
        for count, own in enumerate(hashes, 1):
            is_end = self._hashes.get(own)
            if is_end is None:
                break
            if is_end:
                longest = count
        return longest

    def use(self, hashes: Sequence[bytes], ends: Collection[int] | None = None) -> None:
        """Records that a request computes or reads these blocks. The last of them are forgotten first.

        Args:
            hashes: Of the blocks from the request's begin.
            ends: How many of them are a prefix from which others may go on, beside what is known already; None: any.
        """
        known = self._hashes
        for count in range(len(hashes), 0, -1):
            own = hashes[count - 1]
            known[own] = known.pop(own, False) or ends is None or count in ends
        while len(known) > self._capacity:
            del known[next(iter(known))]

    def clear(self) -> None:
        """Forgets everything, as the engine did."""
        self._hashes.clear()


@dataclass
class _Route:
    """Where a request runs."""

    engine: int
    prefix: Prefix
    num_uncached: int
    """Prompt tokens that the engine has to compute."""
    has_begun: bool = False


@dataclass
class _Engine:
    """What is known of an engine."""

    prefixes: PrefixIndex = field(default_factory=lambda: PrefixIndex(0))
    pending: int = 0
    """Prompt tokens that must be computed for requests without any output."""
    num_running: int = 0
    context: int = 0
    """Prompt tokens of the requests that have output."""

    def add(self, route: _Route, sign: int) -> None:
        if route.has_begun:
            self.num_running += sign
            self.context += sign * route.prefix.num_tokens
        else:
            self.pending += sign * route.num_uncached

    @property
    def load(self) -> float:
        """Tokens of work in front of a new request."""
        return self.pending + RUNNING_COST * self.num_running + CONTEXT_COST * self.context


class Router:
    """Assigns requests to engines and keeps account of their work."""

    def __init__(self, num_engines: int, *, uses_prefixes: bool = True) -> None:
        """Starts with idle engines.

        Args:
            num_engines: Number of engines; they are numbered from 0.
            uses_prefixes: Engines cache prefixes. False: only load counts.
        """
        self._engines = [_Engine() for _ in range(num_engines)]
        self._uses_prefixes = uses_prefixes
        self._block_size = 0
        self._snapshots: Snapshots | None = None
        self._routes: dict[int, _Route] = {}
        """By index of the request."""
        self._turn = 0
        """The engine that wins the next tie."""

    def engine_ready(self, engine: int, num_blocks: int, block_size: int, snapshots: Snapshots | None = None) -> None:
        """Records an engine's new, empty cache.

        Args:
            engine: The engine.
            num_blocks: Blocks in its cache.
            block_size: Tokens in a block, the same for all engines.
            snapshots: Which states are kept, if the model has any, the same for all engines.
        """
        self._engines[engine].prefixes = PrefixIndex(num_blocks)
        self._block_size = block_size
        self._snapshots = snapshots

    def cache_lost(self, engine: int) -> None:
        """Records that an engine's cache is empty again."""
        self._engines[engine].prefixes.clear()

    def prefix(
        self,
        token_ids: I32,
        cache_salt: str = "",
        adapter_hash: str = "",
        features: Sequence[MultiModalFeature] = (),
    ) -> Prefix:
        """A prompt with the hashes of its blocks, as the engines compute them.

        Args:
            token_ids: int32 [n].
            cache_salt: Salt of the request.
            adapter_hash: Content hash of its adapter.
            features: Images of the prompt.
        """
        if not self._uses_prefixes or not self._block_size:
            return Prefix(len(token_ids))
        root = root_hash(cache_salt=cache_salt, adapter_hash=adapter_hash)
        keys = feature_keys(features, self._block_size)
        return Prefix(len(token_ids), root, block_hashes(self._hashed(token_ids), self._block_size, root, keys))

    def _hashed(self, token_ids: I32) -> I32:
        """The beginning of a sequence that is hashed."""
        return token_ids[: MAX_BLOCKS * self._block_size]

    def _num_uncached(self, engine: int, prefix: Prefix) -> int:
        """Tokens of a prompt that an engine would compute: at least the last one."""
        if not prefix.hashes:
            return prefix.num_tokens
        hashes = prefix.hashes[: (prefix.num_tokens - 1) // self._block_size]
        return prefix.num_tokens - self._engines[engine].prefixes.longest(hashes) * self._block_size

    def _ends(self, route: _Route, num_computed: int = 0) -> Collection[int] | None:
        """The blocks after which an engine keeps a request's states, counted from 1; None: others may go on after any.

        Args:
            route: The request.
            num_computed: Tokens that were computed when it ended; 0: it has not, so only what surely stays counts.
        """
        if self._snapshots is None:
            return None
        num_cached = route.prefix.num_tokens - route.num_uncached
        end = self._snapshots.end_of_prompt(route.prefix.num_tokens)
        kept = self._snapshots.kept(num_computed or end, (end, end))
        return {own // self._block_size for own in kept if own > num_cached}

    def cost(self, engine: int, prefix: Prefix, weight: float = 1.0) -> float:
        """Tokens of work until a prompt's first token on an engine; its own count ``weight`` times."""
        return weight * self._num_uncached(engine, prefix) + self._engines[engine].load

    def choose(self, prefix: Prefix, candidates: Collection[int]) -> int:
        """The engine with the least work until a prompt's first token, in which tokens that are not cached count more
        the busier all engines are; engines take turns if several are equal.

        Args:
            prefix: The prompt.
            candidates: Engines to choose from, at least one.
        """
        count = len(self._engines)
        ordered = sorted(candidates, key=lambda engine: (engine - self._turn) % count)
        least = min(self._engines[engine].pending for engine in ordered)
        weight = 1 + CROWDED_COST * min(1.0, least / prefix.num_tokens)
        chosen = min(ordered, key=lambda engine: self.cost(engine, prefix, weight))
        self._turn = (chosen + 1) % count
        return chosen

    def enter(self, index: int, engine: int, prefix: Prefix) -> None:
        """Records that an engine was given a request.

        Args:
            index: Index of the request.
            engine: The engine.
            prefix: Its prompt.
        """
        own = self._engines[engine]
        route = self._routes[index] = _Route(engine, prefix, self._num_uncached(engine, prefix))
        own.add(route, 1)
        own.prefixes.use(prefix.hashes, self._ends(route))

    def begin(self, index: int) -> None:
        """Records that a request got its first output."""
        route = self._routes.get(index)
        if route is not None and not route.has_begun:
            own = self._engines[route.engine]
            own.add(route, -1)
            route.has_begun = True
            own.add(route, 1)

    def leave(self, index: int, token_ids: I32 | None = None) -> None:
        """Records that a request has ended.

        Args:
            index: Index of the request.
            token_ids: int32 [n], prompt and output, whose blocks are cached; None: only those of the prompt.
        """
        route = self._routes.pop(index, None)
        if route is None:
            return
        own, (_, root, hashes) = self._engines[route.engine], route.prefix
        own.add(route, -1)
        if token_ids is not None and root:
            known = len(hashes) * self._block_size
            # The last token was sampled and never computed.
            new = block_hashes(self._hashed(token_ids[:-1])[known:], self._block_size, hashes[-1] if hashes else root)
            hashes = [*hashes, *new]
            own.prefixes.use(hashes, self._ends(route, len(hashes) * self._block_size))

    def engine_of(self, index: int) -> int | None:
        """The engine of a request; None: it is not known."""
        route = self._routes.get(index)
        return None if route is None else route.engine

    def move(self, index: int, candidates: Collection[int]) -> int:
        """Chooses another engine for a request whose engine is gone, and records it. One that has begun counts as
        running: engines tell of a request's first output alone.

        Args:
            index: Index of the request.
            candidates: Engines to choose from, at least one.
        """
        route = self._routes.pop(index)
        self._engines[route.engine].add(route, -1)
        engine = self.choose(route.prefix, candidates)
        self.enter(index, engine, route.prefix)
        if route.has_begun:
            self.begin(index)
        return engine
