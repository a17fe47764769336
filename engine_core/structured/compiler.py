"""Grammars are compiled beside the engine core's loop, and kept."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from engine_core.messages import GrammarSpec, SetVocabulary, i32
from engine_core.request import Request
from engine_core.structured.grammar import GrammarError, compile_grammar
from engine_core.structured.masks import MaskBuilder
from engine_core.structured.request_grammar import BudgetError, RequestGrammar
from engine_core.structured.vocabulary import Vocabulary
from executor.log import get_logger

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = get_logger()

NUM_THREADS = 2
MAX_CACHED = 256
"""Grammars that are kept."""
MAX_WAIT = 30.0
"""Seconds after which a request whose grammar is not compiled yet is refused."""


class Compiled:
    """What became of a request's grammar: it is in the request, or there is a reason why it cannot be."""

    __slots__ = ("param", "problem", "request")

    def __init__(self, request: Request, problem: str | None = None, param: str | None = None) -> None:
        self.request = request
        self.problem = problem
        self.param = param


class GrammarCompiler:
    """Compiles in a few threads; results are taken by the engine core's loop, which ``fileno`` wakes."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._vocabulary: Future[Vocabulary] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._cache: OrderedDict[GrammarSpec, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._done: deque[Compiled] = deque()
        self._started: dict[int, tuple[float, Request]] = {}
        """By index: requests whose grammar is being compiled, and since when."""
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._masks: MaskBuilder | None = None

    def fileno(self) -> int:
        """Readable when ``take`` has something to say."""
        return self._event

    def set_vocabulary(self, message: SetVocabulary) -> None:
        """Takes the tokens that grammars are about. Comes before the first request that has one."""
        self._cache.clear()
        self._vocabulary = self._submit(lambda: Vocabulary(message, self._vocab_size))

    def _submit(self, work: Callable[[], Vocabulary]) -> Future[Vocabulary]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_THREADS, "grammar")
        return self._pool.submit(work)

    @property
    def masks(self) -> MaskBuilder:
        """Builds the masks of steps, once a request has a grammar."""
        if self._masks is None:
            assert self._vocabulary is not None
            self._masks = MaskBuilder(self._vocabulary.result())
        return self._masks

    def start(self, request: Request, remaining: int) -> None:
        """Starts to compile a request's grammar. ``take`` returns it, unless ``forget`` is called before.

        Args:
            request: Has a grammar.
            remaining: Tokens that it may have.
        """
        self._started[request.index] = (time.monotonic(), request)
        if self._pool is None or self._vocabulary is None:
            self._finish(Compiled(request, "is not supported: the engine was not told the vocabulary", ""))
            return
        self._pool.submit(self._prepare, request, remaining)

    def forget(self, index: int) -> None:
        """A request is gone."""
        self._started.pop(index, None)

    def take(self) -> list[Compiled]:
        """Requests whose grammars are compiled, or never will be."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        results = []
        while self._done:
            result = self._done.popleft()
            started = self._started.pop(result.request.index, None)
            if started is not None and started[1] is result.request:
                results.append(result)
        now = time.monotonic()
        for index, (since, request) in list(self._started.items()):
            if now - since < MAX_WAIT:
                break  # they are in the order in which they came
            del self._started[index]
            results.append(Compiled(request, f"was not compiled within {MAX_WAIT:.0f} s; simplify it", ""))
        return results

    @property
    def timeout(self) -> float | None:
        """Seconds until ``take`` has something to say in any case; None: that is not known."""
        if not self._started:
            return None
        since, _ = next(iter(self._started.values()))
        return max(0.0, since + MAX_WAIT - time.monotonic())

    # -- in a thread of the pool -------------------------------------------------------------------------------

    def _prepare(self, request: Request, remaining: int) -> None:
        try:
            if request.index not in self._started:
                return  # it was dropped while it waited for a thread
            self._finish(self._build(request, remaining))
        except Exception as error:
            logger.exception("the grammar of request %s could not be prepared", request.message.request_id)
            self._finish(Compiled(request, f"internal error: {error}"))

    def _build(self, request: Request, remaining: int) -> Compiled:
        spec = request.message.grammar
        assert spec is not None and self._vocabulary is not None
        try:
            vocabulary = self._vocabulary.result()
            matcher = self._matcher(spec, vocabulary).deep_copy()
            grammar = RequestGrammar(matcher, vocabulary, request.params, completes=spec.completes)
            grammar.start(remaining, i32(request.message.resumed_output_token_ids).tolist())
        except BudgetError as error:
            return Compiled(request, str(error), "max_tokens")
        except GrammarError as error:
            return Compiled(request, str(error), "")
        request.grammar = grammar
        return Compiled(request)

    def _matcher(self, spec: GrammarSpec, vocabulary: Vocabulary) -> LLMatcher:
        """The matcher of a grammar, from the cache or compiled by the first request that wants it."""
        with self._lock:
            future = self._cache.get(spec)
            is_mine = future is None
            if future is None:
                future = self._cache[spec] = Future()
                while len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(spec)
        if is_mine:
            try:
                future.set_result(compile_grammar(spec, vocabulary))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _finish(self, result: Compiled) -> None:
        self._done.append(result)
        os.eventfd_write(self._event, 1)
