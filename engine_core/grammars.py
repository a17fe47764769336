"""Grammars in the engine core's loop: when their compiler is made, and the masks of steps."""

from __future__ import annotations

from itertools import chain

from engine_core.flight_record import FlightRecord
from engine_core.grammar_rows import grammar_states
from engine_core.in_flight import InFlight
from engine_core.messages import SetVocabulary
from engine_core.request import Request
from engine_core.slot_table import SlotTable
from engine_core.structured.compiler import Compiled, GrammarCompiler
from engine_core.structured.drafts import mask_counts
from executor.messages import GrammarMask


class Grammars:
    """Makes the compiler early, since that takes long, and keeps it from the loop until a request has a grammar."""

    def __init__(self, record: FlightRecord | None) -> None:
        self._record = record
        self._vocabulary: SetVocabulary | None = None
        self._vocab_size = 0
        self.prepared: GrammarCompiler | None = None
        """The compiler, once the vocabulary is known."""
        self.compiler: GrammarCompiler | None = None
        """The same compiler, once a request has had a grammar; until then the loop has nothing to do."""

    def set_vocabulary(self, message: SetVocabulary) -> None:
        """Takes the tokens' texts; only the first message counts."""
        self._vocabulary = self._vocabulary or message
        self._prepare()

    def set_vocab_size(self, vocab_size: int) -> None:
        """Takes the width of the logits."""
        self._vocab_size = vocab_size
        self._prepare()

    def _prepare(self) -> None:
        """Starts building what all grammars share: calls that hold the GIL for long."""
        if self._vocabulary is not None and self._vocab_size and self.prepared is None:
            self.prepared = GrammarCompiler(self._vocab_size)
            self.prepared.set_vocabulary(self._vocabulary)

    def start(self, request: Request, max_output_tokens: int) -> None:
        """Starts compiling a request's grammar; the request is not scheduled until that is done."""
        if self.compiler is None:
            self.compiler = self.prepared or GrammarCompiler(self._vocab_size)
        if self._record is not None:
            self._record.also_compiling(request.index)
        self.compiler.start(request, max_output_tokens)

    def take(self) -> list[Compiled]:
        """Requests whose grammars are compiled or have failed."""
        return [] if self.compiler is None else self.compiler.take()

    def forget(self, index: int) -> None:
        """Drops a request that is gone."""
        if self.compiler is not None:
            self.compiler.forget(index)

    def mask(self, table: SlotTable, step: InFlight) -> tuple[GrammarMask, list[tuple[int, str | None]]]:
        """The mask of a step with constrained rows, all earlier tokens of which are known.

        Returns:
            The mask, and the requests that end here because no further token is possible: places in
            ``step.grammar_rows``, each with the problem of its grammar, if it has one.
        """
        assert self.compiler is not None
        states = grammar_states(table, step)
        masks, problems = self.compiler.masks.fill(list(chain.from_iterable(states)))
        ended, step.num_masks = mask_counts([len(row) for row in states], problems)
        num_positions = bytes(len(row) for row in states) if len(masks) > len(states) else b""
        return GrammarMask(step_id=step.step_id, bitmask=masks.tobytes(), num_positions=num_positions), ended

    def close(self) -> None:
        """Ends the helper process, if any."""
        if self.prepared is not None:
            self.prepared.close()
