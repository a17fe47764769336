"""Lets requests into the scheduler, each checked again.

Some must wait before it: those that came before the model was loaded, those that may have killed engine cores, until
they may run alone, and those whose grammars would be compiled beside such a trial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from engine_core.flight_record import FlightRecord
from engine_core.grammars import Grammars
from engine_core.messages import EngineCoreOutput, EngineCoreRequest, FinishReason, PoolingSupport, SiblingRequests
from engine_core.request import Request
from engine_core.restart import ISOLATE_DEATHS
from engine_core.scheduler import Scheduler
from engine_core.structured.compiler import Compiled
from engine_core.validation import request_problem
from executor.log import get_logger
from executor.messages import WorkerReady

logger = get_logger()


class Admission:
    """Requests on their way to the scheduler."""

    def __init__(
        self,
        grammars: Grammars,
        send: Callable[[EngineCoreOutput], None],
        record: FlightRecord | None,
        *,
        has_adapters: bool,
    ) -> None:
        """Prepares the admission; ``open`` begins it.

        Args:
            grammars: Compiles the grammars of requests.
            send: Sends the output of a request that is rejected.
            record: Flight record of the work in progress.
            has_adapters: Whether requests may have adapters.
        """
        self._grammars = grammars
        self._send = send
        self._record = record
        self._has_adapters = has_adapters
        self._scheduler: Scheduler | None = None
        """None: the model is not loaded."""
        self._vocab_size, self._hidden_size, self._pooling = 0, 0, PoolingSupport()
        self._early: dict[int, EngineCoreRequest] = {}
        """Requests that arrived before the model was loaded."""
        self._suspects: deque[EngineCoreRequest] = deque()
        """Requests that may have killed engine cores: each is added once the previous one has proven harmless."""
        self._held: dict[int, EngineCoreRequest] = {}
        """Requests whose grammars must not be compiled during a trial, which must run a single request alone."""

    def open(self, scheduler: Scheduler, ready: Sequence[WorkerReady]) -> None:
        """Admits the requests that have come so far, and all to come.

        Args:
            scheduler: Where they go.
            ready: What the workers say of the model.
        """
        self._scheduler = scheduler
        self._vocab_size = min(worker.vocab_size for worker in ready)
        self._hidden_size = min(worker.hidden_size for worker in ready)
        self._pooling = max(ready, key=lambda worker: worker.rank).pooling  # the last pipeline stage pools
        early, self._early = self._early, {}
        for request in early.values():
            self.add(request)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits here, once the model is loaded."""
        return not (self._suspects or self._held)

    @property
    def isolates(self) -> bool:
        """Whether a request runs alone or waits to."""
        return bool(self._suspects) or (self._scheduler is not None and self._scheduler.suspects.is_isolating)

    def add_siblings(self, message: SiblingRequests) -> None:
        """Adds requests that differ only in name, index and seed: their common part is checked once."""
        is_checked = False
        for request in message.requests():
            is_checked = self.add(request, is_checked=is_checked)

    def add(self, message: EngineCoreRequest, *, is_checked: bool = False) -> bool:
        """Accepts a request. Returns False if it was not admitted, or not yet."""
        scheduler = self._scheduler
        if scheduler is None:
            self._early.setdefault(message.index, message)
        elif message.index in scheduler.requests:
            # An answer would end the first one: the api identifies requests by index.
            logger.error("dropped request %s: its index %d is in use", message.request_id, message.index)
        elif message.suspicion is not None and message.suspicion.num_deaths >= ISOLATE_DEATHS:
            self._suspects.append(message)
        elif message.grammar is not None and self.isolates:
            self._held[message.index] = message
        else:
            return self._admit(message, scheduler, is_checked=is_checked) is not None
        return False

    def admit_held(self) -> bool:
        """Admits the requests that had to wait for trials to end, if they have. Returns whether there were any."""
        if not self._held or self.isolates:
            return False
        held, self._held = self._held, {}
        for request in held.values():
            self.add(request)
        return True

    def next_trial(self, *, may_convict: bool) -> None:
        """Begins the trial of the next suspect. No rank may be computing steps of other requests.

        Args:
            may_convict: Whether to begin a trial that may convict its request.
        """
        scheduler = self._scheduler
        assert scheduler is not None
        scheduler.suspects.next_trial(may_convict=may_convict)
        while self._suspects and not scheduler.suspects.is_isolating:
            suspicion = self._suspects[0].suspicion
            if suspicion is not None and suspicion.is_grave and not may_convict:
                return
            request = self._admit(self._suspects.popleft(), scheduler)
            if request is not None:
                scheduler.suspects.isolate([request])
                scheduler.suspects.next_trial()

    def _admit(self, message: EngineCoreRequest, scheduler: Scheduler, *, is_checked: bool = False) -> Request | None:
        """Validates a request, unless that is already done, and queues it. Returns None if it was rejected."""
        request = None
        try:
            if self._record is not None:
                self._record.adding(message.index)
            problem = None if is_checked else self._problem(message, scheduler)
            if problem is None:
                request = Request(message)
                scheduler.add_request(request)
                if message.grammar is not None:
                    self._grammars.start(request, scheduler.pool.max_output_tokens(request))
        except Exception as error:  # a bad request must not break the loop
            logger.exception("failed to add request %s", message.request_id)
            if request is not None:
                scheduler.abort_request(request.index)
            problem = f"internal error: {error}"
        if self._record is not None:
            self._record.adding(0)
        if problem is None:
            return request
        num_outputs = len(message.resumed_output_token_ids) // 4
        self._send(
            EngineCoreOutput(
                index=message.index,
                first_output_index=num_outputs,
                finish_reason=FinishReason.ERROR,
                error=problem,
            )
        )
        return None

    def _problem(self, message: EngineCoreRequest, scheduler: Scheduler) -> str | None:
        return request_problem(
            message,
            self._vocab_size,
            scheduler.max_model_len,
            self._hidden_size,
            self._pooling,
            multimodal=scheduler.images.support,
            has_adapters=self._has_adapters,
        )

    def take_grammars(self) -> bool:
        """Queues requests whose grammars are compiled, and rejects those whose grammars failed.

        Returns:
            Whether there were any.
        """
        compiled = self._grammars.take()
        if not compiled:
            return False
        assert self._scheduler is not None
        for each in compiled:
            if each.problem is None:
                self._scheduler.pool.grammar_is_there(each.request)
            else:
                self._refuse(each, self._scheduler)
        self._note_compiling()
        return True

    def _refuse(self, compiled: Compiled, scheduler: Scheduler) -> None:
        request, param = compiled.request, compiled.param
        if param == "":
            param = request.grammar_param
        output = scheduler.pool.fail(request, f"{param} {compiled.problem}" if param else str(compiled.problem))
        self._send(msgspec.structs.replace(output, error_param=param))

    def abort(self, indices: Iterable[int]) -> None:
        """Drops requests, wherever they are."""
        for index in indices:
            self._early.pop(index, None)
            self._held.pop(index, None)
            self._suspects = deque(suspect for suspect in self._suspects if suspect.index != index)
            self._grammars.forget(index)
            if self._scheduler is not None:
                self._scheduler.abort_request(index)
        self._note_compiling()

    def _note_compiling(self) -> None:
        if self._record is not None and self._scheduler is not None and self._grammars.compiler is not None:
            self._record.compiling(self._scheduler.pool.compiling)
