"""Grammars are compiled beside the engine core's loop, and kept.

One that is not known to be cheap is tried in a helper process first (``trial.py``); what became of it is remembered.
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
"""Grammars that are kept."""
MAX_CACHED_BYTES = 256 << 20
"""Memory that those may take together, as their trials told."""
MIN_GRAMMAR_BYTES = 256 << 10
"""What a grammar is taken to have at least, with the states that are found while it is used."""
MAX_VERDICTS = 2048
"""Grammars of which it is remembered what a trial said."""
STACK_BYTES = 16 << 20
"""Of a thread that compiles: several times what a trial has. It is address space, not memory."""
MAX_WAIT = 30.0
"""Seconds after which a request whose grammar is not compiled yet is refused."""


class Compiled:
    """What became of a request's grammar: it is in the request, or there is a reason why it cannot be."""

    __slots__ = ("param", "problem", "request")

    def __init__(self, request: Request, problem: str | None = None, param: str | None = None) -> None:
        self.request = request
        self.problem = problem
        self.param = param


class _Verdict:
    """What a trial said of a grammar."""

    __slots__ = ("num_bytes", "problem", "text")

    def __init__(self, proof: Proof | None = None, problem: str = "") -> None:
        self.text = proof.text if proof is not None else ""
        """What to compile, until that is done."""
        self.num_bytes = proof.num_bytes if proof is not None else 0
        self.problem = problem


class _Trial:
    """One that runs or waits, and the requests that wait for it."""

    __slots__ = ("future", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[Request, int]] = {}
        """By index: the request, and how many tokens it may have."""
        self.future: Future[bytes] | None = None


class GrammarCompiler:
    """Compiles in a few threads; results are taken by the engine core's loop, which ``fileno`` wakes."""

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
        """By index of the request that waits for it."""
        self._lock = threading.Lock()
        """For cache, verdicts and trials."""
        self._done: deque[Compiled] = deque()
        self._started: dict[int, tuple[float, Request]] = {}
        """By index: requests whose grammar is being compiled, and since when."""
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._masks: MaskBuilder | None = None

    def fileno(self) -> int:
        """Readable when ``take`` has something to say."""
        return self._event

    def set_vocabulary(self, message: SetVocabulary) -> None:
        """Takes the tokens that grammars are about. Comes before the first request that has one, and once."""
        self._helper = grammar_helper(message, self._vocab_size)
        self._pool = _start_pool()
        self._vocabulary = self._pool.submit(lambda: Vocabulary(message, self._vocab_size))

    def close(self) -> None:
        """Ends the helper process, if there is one."""
        if self._helper is not None:
            self._helper.close()

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
        """A request is gone, and so is a trial that only it waits for."""
        if self._started.pop(index, None) is None:
            return
        with self._lock:
            trial = self._trial_of.pop(index, None)
            if trial is None:
                return
            trial.waiting.pop(index, None)
            is_over = not trial.waiting
        if is_over and trial.future is not None:
            trial.future.cancel()  # unless it runs

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
        while self._started:  # they are in the order in which they came
            index, (since, request) = next(iter(self._started.items()))
            if now - since < MAX_WAIT:
                break
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
            result = self._build(request, remaining)
            if result is not None:
                self._finish(result)
        except Exception as error:
            logger.exception("the grammar of request %s could not be prepared", request.message.request_id)
            self._finish(Compiled(request, f"internal error: {error}"))

    def _build(self, request: Request, remaining: int) -> Compiled | None:
        """Gives a request its grammar. None: a trial has to say first whether that is safe."""
        spec = request.message.grammar
        assert spec is not None and self._vocabulary is not None
        try:
            vocabulary = self._vocabulary.result()
            thought, spec = spec.thought, msgspec.structs.replace(spec, thought=None)  # it is not compiled
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
        """Has a grammar tried; its requests are prepared when the verdict is there."""
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
        except Exception as error:  # also that no thread can be started: nobody else would end the trial
            failure: Future[bytes] = Future()
            failure.set_exception(error)
            self._tried(key, spec, failure)
        else:
            trial.future.add_done_callback(lambda future: self._tried(key, spec, future))
        return None

    def _tried(self, key: bytes, spec: GrammarSpec, future: Future[bytes]) -> None:
        """A trial is over: its requests go on. Called in any thread."""
        verdict: _Verdict | None = None
        trouble = ""
        if future.cancelled():
            pass  # nobody wanted it any more; whoever came since starts over
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
        """The matcher of a grammar, from the cache or compiled by the first request that wants it."""
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
                verdict.text = ""  # made again should it be wanted again: it may be long
        return future.result()

    def _finish(self, result: Compiled) -> None:
        self._done.append(result)
        os.eventfd_write(self._event, 1)


def _start_pool() -> ThreadPoolExecutor:
    """Threads with a large stack, whatever the shell's limit for ours is."""
    pool = ThreadPoolExecutor(NUM_THREADS, "grammar")
    before = threading.stack_size(STACK_BYTES)
    try:
        all_there = threading.Barrier(NUM_THREADS)  # a thread that is idle again would be given the second task, too
        for _ in range(NUM_THREADS):
            pool.submit(all_there.wait)
    finally:
        threading.stack_size(before)
    return pool
