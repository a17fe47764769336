"""Compiles grammars outside the engine core's loop and caches them.

A grammar that is not known to be cheap is first tried in a helper process (``trial.py``); the verdict is cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from engine_core.messages import GrammarSpec, SetVocabulary, i32
from engine_core.request import Request
from engine_core.structured.cost import is_cheap
from engine_core.structured.examples import pattern_examples
from engine_core.structured.grammar import GrammarError, compile_grammar
from engine_core.structured.masks import MaskBuilder
from engine_core.structured.request_grammar import BudgetError, RequestGrammar
from engine_core.structured.trial import Proof, grammar_helper
from engine_core.structured.vocabulary import Vocabulary
from executor.helper import Helper, HelperError, JobError
from executor.log import get_logger

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = get_logger()

NUM_THREADS = 2
MAX_CACHED = 256
"""Maximum number of cached grammars."""
MAX_CACHED_BYTES = 256 << 20
"""Memory limit of the cached grammars, as measured by their trials."""
MIN_GRAMMAR_BYTES = 256 << 10
"""Minimum size assumed for a grammar, including states discovered during use."""
MAX_VERDICTS = 2048
"""Maximum number of cached trial verdicts."""
STACK_BYTES = 16 << 20
"""Stack of a compiling thread: several times that of a trial. This is address space, not memory."""
MAX_WAIT = 30.0
"""Seconds after which a request whose grammar is not compiled yet is rejected."""


class Compiled:
    """Result of compiling a request's grammar: it is set on the request, or there is a problem."""

    __slots__ = ("param", "problem", "request")

    def __init__(self, request: Request, problem: str | None = None, param: str | None = None) -> None:
        self.request = request
        self.problem = problem
        self.param = param


class _Verdict:
    """A trial's verdict on a grammar."""

    __slots__ = ("num_bytes", "problem", "text")

    def __init__(self, proof: Proof | None = None, problem: str = "") -> None:
        self.text = proof.text if proof is not None else ""
        """Text to compile; emptied once compiled."""
        self.num_bytes = proof.num_bytes if proof is not None else 0
        self.problem = problem


class _Trial:
    """A running or queued trial and the requests that wait for it."""

    __slots__ = ("future", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[Request, int]] = {}
        """By index: the request and the number of tokens that it may have."""
        self.future: Future[bytes] | None = None


class GrammarCompiler:
    """Compiles in a few threads. The engine core's loop takes the results; ``fileno`` wakes it."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._vocabulary: Future[Vocabulary] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._helper: Helper | None = None
        self._cache: OrderedDict[bytes, tuple[Future[LLMatcher], int]] = OrderedDict()
        self._cached_bytes = 0
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._trials: dict[bytes, _Trial] = {}
        self._trial_of: dict[int, _Trial] = {}
        """By index of the waiting request."""
        self._lock = threading.Lock()
        """Guards cache, verdicts and trials."""
        self._done: deque[Compiled] = deque()
        self._started: dict[int, tuple[float, Request]] = {}
        """By index: requests whose grammars are being compiled, with their start times."""
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._masks: MaskBuilder | None = None

    def fileno(self) -> int:
        """Descriptor that is readable when ``take`` has results."""
        return self._event

    def set_vocabulary(self, message: SetVocabulary) -> None:
        """Sets the vocabulary. Called once, before the first request with a grammar."""
        self._helper = grammar_helper(message, self._vocab_size)
        self._pool = _start_pool()
        self._vocabulary = self._pool.submit(lambda: Vocabulary(message, self._vocab_size))

    def close(self) -> None:
        """Ends the helper process, if any."""
        if self._helper is not None:
            self._helper.close()

    @property
    def masks(self) -> MaskBuilder:
        """The builder of step masks; needed once a request has a grammar."""
        if self._masks is None:
            assert self._vocabulary is not None
            self._masks = MaskBuilder(self._vocabulary.result())
        return self._masks

    def start(self, request: Request, remaining: int) -> None:
        """Starts compiling a request's grammar. ``take`` returns the result, unless ``forget`` is called first.

        Args:
            request: A request with a grammar.
            remaining: Number of tokens that it may have.
        """
        self._started[request.index] = (time.monotonic(), request)
        if self._pool is None or self._vocabulary is None:
            self._finish(Compiled(request, "is not supported: the engine has no vocabulary", ""))
            return
        self._pool.submit(self._prepare, request, remaining)

    def forget(self, index: int) -> None:
        """Drops a request that is gone, and a trial that only it waits for."""
        if self._started.pop(index, None) is None:
            return
        with self._lock:
            trial = self._trial_of.pop(index, None)
            if trial is None:
                return
            trial.waiting.pop(index, None)
            is_over = not trial.waiting
        if is_over and trial.future is not None:
            trial.future.cancel()  # unless it is running

    def take(self) -> list[Compiled]:
        """Returns requests whose grammars are compiled or have failed."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        results = []
        while self._done:
            result = self._done.popleft()
            started = self._started.pop(result.request.index, None)
            if started is not None and started[1] is result.request:
                results.append(result)
        now = time.monotonic()
        while self._started:  # in order of arrival
            index, (since, request) = next(iter(self._started.items()))
            if now - since < MAX_WAIT:
                break
            del self._started[index]
            results.append(Compiled(request, f"was not compiled within {MAX_WAIT:.0f} s; simplify it", ""))
        return results

    @property
    def timeout(self) -> float | None:
        """Seconds until ``take`` has a result at the latest; None: unknown."""
        if not self._started:
            return None
        since, _ = next(iter(self._started.values()))
        return max(0.0, since + MAX_WAIT - time.monotonic())

    # -- in a thread of the pool -------------------------------------------------------------------------------

    def _prepare(self, request: Request, remaining: int) -> None:
        try:
            if request.index not in self._started:
                return  # dropped while waiting for a thread
            result = self._build(request, remaining)
            if result is not None:
                self._finish(result)
        except Exception as error:
            logger.exception("failed to prepare the grammar of request %s", request.message.request_id)
            self._finish(Compiled(request, f"internal error: {error}"))

    def _build(self, request: Request, remaining: int) -> Compiled | None:
        """Compiles a request's grammar. Returns None if a trial must first show that this is safe."""
        spec = request.message.grammar
        assert spec is not None and self._vocabulary is not None
        try:
            vocabulary = self._vocabulary.result()
            thought, spec = spec.thought, msgspec.structs.replace(spec, thought=None)  # not part of what is compiled
            key = hashlib.blake2b(msgspec.msgpack.encode(spec), digest_size=16).digest()
            with self._lock:
                verdict = self._verdicts.get(key)
                is_known = verdict is not None or key in self._cache
            if not is_known and not is_cheap(spec):
                return self._try(key, spec, request, remaining)
            if verdict is not None and verdict.problem:
                raise GrammarError(verdict.problem)
            matcher = self._matcher(key, spec, vocabulary, verdict).deep_copy()
            examples = pattern_examples(spec, vocabulary)
            grammar = RequestGrammar(
                matcher, vocabulary, request.params, completes=spec.completes, examples=examples, thought=thought
            )
            grammar.start(remaining, i32(request.message.resumed_output_token_ids).tolist())
        except BudgetError as error:
            return Compiled(request, str(error), "max_tokens")
        except GrammarError as error:
            return Compiled(request, str(error), "")
        request.grammar = grammar
        return Compiled(request)

    def _try(self, key: bytes, spec: GrammarSpec, request: Request, remaining: int) -> Compiled | None:
        """Starts a trial of a grammar; its requests are prepared once the verdict arrives."""
        assert self._helper is not None
        with self._lock:
            trial = self._trials.get(key)
            is_first = trial is None
            if trial is None:
                trial = self._trials[key] = _Trial()
            trial.waiting[request.index] = request, remaining
            self._trial_of[request.index] = trial
        if not is_first:
            return None
        owner = "\0".join(request.message.tenant)
        try:
            trial.future = self._helper.submit(
                "try_grammar", msgspec.msgpack.encode(spec), owner=owner, patience=MAX_WAIT
            )
        except Exception as error:  # including failure to start a thread: nothing else would end the trial
            failure: Future[bytes] = Future()
            failure.set_exception(error)
            self._tried(key, spec, failure)
        else:
            trial.future.add_done_callback(lambda future: self._tried(key, spec, future))
        return None

    def _tried(self, key: bytes, spec: GrammarSpec, future: Future[bytes]) -> None:
        """Handles the end of a trial: its requests proceed. Called from any thread."""
        verdict: _Verdict | None = None
        trouble = ""
        if future.cancelled():
            pass  # no longer needed; later requests start over
        elif (error := future.exception()) is None:
            verdict = _Verdict(msgspec.msgpack.decode(future.result(), type=Proof))
        elif isinstance(error, JobError):
            verdict = _Verdict(problem=str(error))
        elif isinstance(error, HelperError) and error.is_fault_of_data:
            verdict = _Verdict(problem=f"is too complex: {error}; simplify it")
        else:
            trouble = f"could not be checked: {error}"
        with self._lock:
            waiting = self._trials.pop(key).waiting
            for index in waiting:
                self._trial_of.pop(index, None)
            if verdict is not None:
                self._verdicts[key] = verdict
                while len(self._verdicts) > MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
        for request, remaining in waiting.values():
            if trouble:
                self._finish(Compiled(request, f"the grammar {trouble}"))
            else:
                assert self._pool is not None
                self._pool.submit(self._prepare, request, remaining)

    def _matcher(self, key: bytes, spec: GrammarSpec, vocabulary: Vocabulary, verdict: _Verdict | None) -> LLMatcher:
        """The matcher of a grammar, from the cache or compiled by the first request that needs it."""
        with self._lock:
            entry = self._cache.get(key)
            is_mine = entry is None
            if entry is None:
                num_bytes = max(MIN_GRAMMAR_BYTES, 0 if verdict is None else verdict.num_bytes)
                entry = self._cache[key] = (Future(), num_bytes)
                self._cached_bytes += num_bytes
                while len(self._cache) > 1 and (len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES):
                    self._cached_bytes -= self._cache.popitem(last=False)[1][1]
            else:
                self._cache.move_to_end(key)
        future = entry[0]
        if is_mine:
            try:
                future.set_result(compile_grammar(spec, vocabulary, "" if verdict is None else verdict.text))
            except BaseException as error:
                future.set_exception(error)
            if verdict is not None:
                verdict.text = ""  # may be long; remade if needed again
        return future.result()

    def _finish(self, result: Compiled) -> None:
        self._done.append(result)
        os.eventfd_write(self._event, 1)


def _start_pool() -> ThreadPoolExecutor:
    """Starts threads with a large stack, regardless of the shell's limit."""
    pool = ThreadPoolExecutor(NUM_THREADS, "grammar")
    before = threading.stack_size(STACK_BYTES)
    try:
        all_there = threading.Barrier(NUM_THREADS)  # keeps one thread from taking several of the tasks
        for _ in range(NUM_THREADS):
            pool.submit(all_there.wait)
    finally:
        threading.stack_size(before)
    return pool
