"""The worker's side of speculation: which drafts a step verifies, which are accepted, and which are proposed next."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from executor.config import SpeculativeConfig
from executor.messages import I32, I64, ForcedDrafts, NewRequest, SchedulerOutput, i32, row_offsets, u8
from executor.request_states import RequestStates
from executor.sampling.base import SamplerOutput, SampleRows
from executor.speculative.base import ComputedRows, Drafts, ProposerContext
from executor.speculative.draft_lengths import FIRST_LOGITS, MAX_KINDS, DraftLengths
from executor.speculative.registry import create_proposer

U8 = npt.NDArray[np.uint8]

_NO_TOKENS: I32 = np.empty(0, np.int32)
_NO_COUNT: I64 = np.zeros(1, np.int64)
_NOTHING = Drafts(np.empty(0, np.int64), _NO_TOKENS)

NOT_MEASURED: Mapping[int, float] = {}
FIRST_LOGIT = 1.0
"""That of a draft whose proposal took time, before anything was learned: it is right in 3 of 4 cases."""
PATIENCE = 8
"""Steps without drafts after which a slot's next step does not wait for the last one to propose some."""
SEARCH_PERIOD = 4
"""After as many, a slot's text is searched each time that this many steps have passed, or up to a quarter of those that
have brought nothing: searches take the more of a step the less they bring. Periods are powers of two of the same steps,
so that slots that began at different times take their turns together. While nobody's turn comes, nothing is done."""
MAX_SEARCH_PERIOD = 32
OVERHEAD = 1.5
"""What drafts take of a step while they are expected, in times of what their proposal takes: plans allow them, and the
core looks for them in results."""
OVERHEAD_RATE = 0.05
MAX_MS = 2.0
"""Of what a proposal seems to take: other work on the machine may take its time."""


def own_tokens(plan: SchedulerOutput) -> I32:
    """Tokens that a plan computes of each row without drafts: int32 [rows]."""
    counts = i32(plan.num_scheduled_tokens)
    return counts - u8(plan.num_draft_tokens) if plan.num_draft_tokens else counts


def step_rows(plan: SchedulerOutput, states: RequestStates) -> tuple[I32, I32, U8, bool]:
    """The rows of a plan, each with as many of its drafts as the plan allows.

    Returns:
        int32 [rows]: slots; int32 [rows]: tokens to compute, drafts included; uint8 [rows]: tokens to sample, 0 or one
        more than the drafts; and whether there are any drafts.
    """
    slots, counts, num_sampled = i32(plan.slots), own_tokens(plan), u8(plan.num_sampled)
    if not plan.num_draft_tokens:
        return slots, counts, num_sampled, False
    allowed = u8(plan.num_draft_tokens)
    for forced in plan.forced_drafts:
        _force(forced, states)
    num_drafts = np.minimum(states.num_drafts[slots], allowed).astype(np.uint8)
    return slots, counts + num_drafts, num_sampled + num_drafts, bool(num_drafts.any())


def _force(forced: ForcedDrafts, states: RequestStates) -> None:
    """Replaces a slot's drafts by those of a plan, if they continue its tokens."""
    slot = forced.slot
    known, own = int(states.num_known[slot]), np.array([slot], np.int32)
    drafts = forced.after(states.token_ids[slot, :known])[: int(states.draft_room(own)[0])]
    if len(drafts) and known == states.num_tokens[slot]:
        states.set_drafts(own, np.array([len(drafts)]), drafts)


def drafts_of(rows: SampleRows, states: RequestStates) -> I64:
    """The draft at each position that a step samples, int64 [samples]; -1 if none.

    Also sets the rows' offsets, and notes that their requests verify drafts until ``settle``.
    """
    numbers = rows.step_rows
    if len(numbers) and numbers[0] == numbers[-1]:  # one row, as in most steps
        rows.offsets = np.arange(len(numbers))
        states.num_verifying[rows.slots[0]] += 1
        alone: I64 = states.token_ids[rows.slots[0], rows.positions].astype(np.int64)
        alone[-1] = -1
        return alone
    is_first = np.empty(len(numbers), np.bool_)
    is_first[0], is_first[1:] = True, numbers[1:] != numbers[:-1]
    firsts = is_first.nonzero()[0]
    counts = _counts(firsts, len(numbers))
    states.num_verifying[rows.slots[firsts]] += 1
    rows.offsets = np.arange(len(numbers)) - firsts.repeat(counts)
    drafts = states.token_ids[rows.slots, rows.positions].astype(np.int64)
    drafts[firsts + counts - 1] = -1
    return drafts


def _counts(firsts: I64, total: int) -> I64:
    """Samples of each row, int64 [rows], which begin at ``firsts``; there are ``total`` of all rows."""
    counts: I64 = np.empty(len(firsts), np.int64)
    counts[:-1], counts[-1:] = firsts[1:], total
    counts -= firsts
    return counts


def num_verified(rows: SampleRows) -> bytes:
    """Drafts that each row of a step with drafts verifies: uint8 [rows that sample]."""
    assert rows.offsets is not None
    if rows.step_rows[0] == rows.step_rows[-1]:
        return bytes((len(rows) - 1,))
    firsts = (rows.offsets == 0).nonzero()[0]
    return (_counts(firsts, len(rows)) - 1).astype(np.uint8).tobytes()


def settle(
    states: RequestStates, rows: SampleRows, epochs: I64, drafts: I64 | None, output: SamplerOutput
) -> tuple[SamplerOutput, bytes]:
    """Determines the accepted drafts and fills in the tokens.

    Args:
        states: Takes the tokens.
        rows: The sampled rows.
        epochs: int64 [samples]: the slots' epochs when the step began.
        drafts: int64 [samples], see ``drafts_of``; None: no drafts.
        output: The sampler's output.

    Returns:
        The output without the tokens after a rejected draft, and ``ModelRunnerOutput.num_accepted``.
    """
    if not len(rows):
        return output, b""
    if drafts is None:
        states.fill(rows.slots, epochs, rows.positions, output.token_ids)
        return output, b""
    assert rows.offsets is not None
    if rows.step_rows[0] == rows.step_rows[-1] and not output.logprobs and not output.row_errors:
        return _settle_alone(states, rows, epochs, drafts, output.token_ids)
    firsts = (rows.offsets == 0).nonzero()[0]
    holds = output.token_ids == drafts
    numbers = rows.step_rows[firsts]
    for error in output.row_errors:
        holds[firsts[np.searchsorted(numbers, error.row)] + error.position] = False
    accepted = np.minimum.reduceat(np.where(holds, len(rows), rows.offsets), firsts)
    return _keep(states, rows, epochs, firsts, accepted, output)


def settle_late(
    states: RequestStates, rows: SampleRows, epochs: I64, accepted: I64, output: SamplerOutput
) -> tuple[SamplerOutput, bytes]:
    """As ``settle``, where the device has determined which drafts are accepted, and the host knew only upper bounds of
    the rows' positions.

    Args:
        states: Takes the tokens. Those of all earlier steps are there.
        rows: The sampled rows. They get their positions.
        epochs: int64 [samples]: the slots' epochs when the step began.
        accepted: int64 [rows that sample].
        output: The sampler's output.
    """
    if not len(rows):
        return output, b""
    rows.positions = states.num_known[rows.slots]
    if rows.offsets is None:
        states.fill(rows.slots, epochs, rows.positions, output.token_ids)
        return output, b""
    rows.positions += rows.offsets
    return _keep(states, rows, epochs, (rows.offsets == 0).nonzero()[0], accepted, output)


def _keep(
    states: RequestStates, rows: SampleRows, epochs: I64, firsts: I64, accepted: I64, output: SamplerOutput
) -> tuple[SamplerOutput, bytes]:
    """Fills in the tokens up to the first rejected draft of each row.

    Args:
        states: Takes them.
        rows: The sampled rows.
        epochs: int64 [samples].
        firsts: int64 [rows that sample]: the first sample of each.
        accepted: int64 [rows that sample].
        output: The sampler's output.
    """
    assert rows.offsets is not None
    counts, numbers = _counts(firsts, len(rows)), rows.step_rows[firsts]
    kept = (rows.offsets <= accepted.repeat(counts)).nonzero()[0]
    token_ids = output.token_ids[kept]
    states.fill(rows.slots[kept], epochs[kept], rows.positions[kept], token_ids)
    states.retract(rows.slots[firsts], epochs[firsts], counts - 1 - accepted, accepted)
    verdict = accepted.astype(np.uint8).tobytes()
    if not output.logprobs and not output.row_errors:
        return SamplerOutput(token_ids), verdict
    last = dict(zip(numbers.tolist(), accepted.tolist(), strict=True))
    reached = SamplerOutput(
        token_ids=token_ids,
        logprobs=[entry for entry in output.logprobs if entry.position <= last[entry.row]],
        row_errors=[error for error in output.row_errors if error.position == last[error.row]],
    )
    return reached, verdict


def _settle_alone(
    states: RequestStates, rows: SampleRows, epochs: I64, drafts: I64, token_ids: I64
) -> tuple[SamplerOutput, bytes]:
    """``settle`` for the samples of one row, without log probabilities or errors."""
    count = int((token_ids == drafts).argmin()) + 1  # the last one has no draft
    token_ids = token_ids[:count]
    states.fill(rows.slots[:count], epochs[:count], rows.positions[:count], token_ids)
    rejected, accepted = np.array((len(rows) - count,)), np.array((count - 1,))
    states.retract(rows.slots[:1], epochs[:1], rejected, accepted)
    return SamplerOutput(token_ids), bytes((count - 1,))


class Speculation:
    """The worker's proposer, if any."""

    def __init__(
        self,
        config: SpeculativeConfig | None,
        max_num_seqs: int,
        context: ProposerContext | None = None,
        step_times: Mapping[int, float] = NOT_MEASURED,
    ) -> None:
        """
        Args:
            config: How to speculate; None: not at all.
            max_num_seqs: Number of slots.
            context: What proposers need.
            step_times: Milliseconds by number of tokens, see ``time_steps``.
        """
        self._proposer = None if config is None else create_proposer(config, max_num_seqs, context)
        self._costs = None if self._proposer is None else self._proposer.costs
        self.max_drafts = 0 if config is None else config.num_speculative_tokens
        """Maximum drafts of a row."""
        self._limits = np.full(max_num_seqs, self.max_drafts, np.int64)
        """Maximum drafts by slot."""
        self._ends = np.zeros(max_num_seqs, np.int64)
        """Maximum length of prompt and output together, by slot."""
        self._lengths = DraftLengths(
            max_num_seqs,
            self.max_drafts,
            0.0 if config is None else config.min_token_prob,
            is_adaptive=config is not None and config.is_adaptive,
            first_logits=FIRST_LOGITS if self._costs is None else (FIRST_LOGIT,) * MAX_KINDS,
        )
        self._lengths.costs.start(step_times)
        self._always_waits = config is not None and not config.is_adaptive
        """Ranks must not differ in which results they know when a step begins."""
        self._always_searches = self._always_waits or self._costs is not None
        self._num_idle = np.zeros(max_num_seqs, np.int64)
        """Steps of a slot since drafts were last worth verifying."""
        self._told = np.zeros(max_num_seqs, np.bool_)
        """By slot: whether the engine core was told of drafts after the slot's last step."""
        self._num_steps = 0
        """Steps after which drafts might have been proposed."""
        self._num_barren = 0
        """Those since drafts were last worth verifying in any slot."""
        self._rest = 0
        """Steps in which nothing is searched or learned."""
        self._proposing_ms = 0.0
        """What it takes to propose drafts after a step."""

    def add(self, request: NewRequest) -> None:
        """Registers a request that enters a slot."""
        if self._proposer is None:
            return
        self._proposer.add(request)
        params = request.params
        if params is None:
            return
        own = params.num_speculative_tokens
        self._limits[request.slot] = self.max_drafts if own is None else min(own, self.max_drafts)
        self._ends[request.slot] = request.num_prompt_tokens + params.max_tokens
        self._lengths.add(request.slot)
        # Texts that never repeat themselves rarely come alone: less is expected of those that follow them.
        patience = max(1, PATIENCE >> self._num_barren // PATIENCE) if own != 0 else 0
        self._num_idle[request.slot] = PATIENCE - patience
        self._told[request.slot] = False
        self._rest = 0

    def remove(self, slots: I32, states: RequestStates) -> None:
        """Registers the requests that leave their slots. ``states`` still has their tokens."""
        if self._proposer is None:
            return
        for slot in slots.tolist():
            output = states.token_ids[slot, states.num_prompt[slot] : states.num_known[slot]]
            self._proposer.remove(slot, output)

    def is_expected(self, slots: I32) -> bool:
        """Whether some of these slots may have drafts in their next step, so that it has to wait for the last one."""
        return self._always_waits or bool((self._num_idle[slots] < PATIENCE).any())

    def note_step(self, num_tokens: int, milliseconds: float) -> None:
        """Records the time of a step that sampled at each of its tokens."""
        if self._proposer is not None and not self._rest:
            self._lengths.costs.add(num_tokens, milliseconds)

    def follow(self, computed: ComputedRows, states: RequestStates) -> None:
        """Registers that a step is done."""
        if self._proposer is not None:
            self._proposer.follow(computed, states)

    def propose(self, rows: SampleRows, epochs: I64, states: RequestStates) -> Drafts | None:
        """Proposes drafts for the next step of the requests that got tokens, and writes them to the table.

        Args:
            rows: The sampled rows.
            epochs: int64 [samples]: the slots' epochs when the step began.
            states: Has all tokens of these slots.

        Returns:
            The drafts of each row that samples; None: no drafts at all.
        """
        if self._proposer is None or not len(rows):
            return None
        self._num_steps += 1
        if self._rest and rows.offsets is None:
            self._rest -= 1
            return None
        self._rest = 0
        begin = time.perf_counter()
        if rows.slots[0] == rows.slots[-1]:
            is_current = states.epochs[rows.slots[0]] == epochs[0]
            drafts = self._propose_alone(rows.slots[:1], states) if is_current else None
        else:
            drafts = self._propose(rows, epochs, states)
        took = (time.perf_counter() - begin) * 1e3
        self._proposing_ms += OVERHEAD_RATE * (min(took, MAX_MS) - self._proposing_ms)
        return drafts

    def _propose_alone(self, slots: I32, states: RequestStates) -> Drafts | None:
        """``_propose`` for one slot, int32 [1]: the usual case, in which arrays take longer than the search."""
        slot = int(slots[0])
        idle, count = int(self._num_idle[slot]), 0
        self._lengths.learn((slot,), states)
        is_due = self._always_searches or self._num_steps % _period(idle) == 0
        proposed = self._proposed(slots, states) if is_due else _NOTHING
        idle += 1
        if len(proposed.token_ids):
            (count,) = self._lengths.choose((slot,), proposed, states)
            if not self._always_searches and not self._lengths.pays(1, OVERHEAD * self._proposing_ms):
                count, idle = 0, PATIENCE + 1
            elif count:
                idle = 0
            if states.num_known[slot] != states.num_tokens[slot]:
                count = 0
        had_drafts, self._told[slot] = bool(self._told[slot]), count > 0
        if not count:
            states.num_drafts[slot] = 0
            idle += self._start_rest(_period(idle))
        self._num_idle[slot] = idle
        self._num_barren = self._num_barren + 1 + self._rest if idle else 0
        if not count:
            return Drafts(_NO_COUNT, _NO_TOKENS) if had_drafts else None
        drafts = Drafts(np.array([count]), proposed.token_ids[:count])
        states.set_drafts(slots, drafts.counts, drafts.token_ids)
        return drafts

    def _propose(self, rows: SampleRows, epochs: I64, states: RequestStates) -> Drafts | None:
        firsts = slice(None) if rows.offsets is None else (rows.offsets == 0).nonzero()[0]
        slots = rows.slots[firsts]
        is_current = states.epochs[slots] == epochs[firsts]
        if not is_current.all():
            slots = slots[is_current]
            if not len(slots):
                return None
        numbers = slots.tolist()
        self._lengths.learn(numbers, states)
        idle = self._num_idle[slots]
        is_due = (self._num_steps % _periods(idle) == 0) | self._always_searches
        proposed = self._proposed(slots, states, is_due) if is_due.any() else _NOTHING
        idle += 1
        counts = np.zeros(len(slots), np.int64)
        if len(proposed.token_ids):
            counts[:] = self._lengths.choose(numbers, proposed, states)
            if self._always_searches or self._lengths.pays(len(slots), OVERHEAD * self._proposing_ms):
                idle[counts > 0] = 0
            else:
                counts[:] = 0
                idle[:] = PATIENCE + 1
            # A step that is under way already, since no drafts were expected, has none.
            counts *= states.num_known[slots] == states.num_tokens[slots]
        has_drafts = bool(counts.any())
        if not has_drafts:  # the usual case of text that never repeats
            idle += self._start_rest(int(_periods(idle).min()))
        self._num_idle[slots] = idle
        self._num_barren = self._num_barren + 1 + self._rest if idle.all() else 0
        if not has_drafts:
            had_drafts = bool(self._told[slots].any())
            self._told[slots] = False
            states.num_drafts[slots] = 0
            return Drafts(_spread(counts, is_current), _NO_TOKENS) if had_drafts else None
        places, offsets = row_offsets(proposed.counts)
        token_ids = proposed.token_ids[offsets < counts[places]]
        drafts = Drafts(_spread(counts, is_current), token_ids)
        states.set_drafts(slots, counts, drafts.token_ids)
        self._told[slots] = counts > 0
        return drafts

    def _start_rest(self, period: int) -> int:
        """Lets nothing be done before a period of the searches begins, and returns for how many steps."""
        self._rest = 0 if self._always_searches else period - 1 - self._num_steps % period
        return self._rest

    def _proposed(self, slots: I32, states: RequestStates, is_due: npt.NDArray[np.bool_] | bool = True) -> Drafts:
        """Proposals for slots whose tokens have just come, of those whose turn it is."""
        assert self._proposer is not None
        # The last token of a request is never verified: nothing follows it.
        room = np.minimum(states.draft_room(slots), self._ends[slots] - 1 - states.num_known[slots])
        limits = np.maximum(np.minimum(self._limits[slots], room), 0) * is_due
        if self._costs is not None:
            limits = self._lengths.affordable(slots, limits, self._costs)
        return self._proposer.propose(slots, limits, states)


def _period(num_idle: int) -> int:
    """Steps between searches of a slot that had no drafts for so many."""
    if num_idle < PATIENCE:
        return 1
    quarter: int = 1 << (num_idle // 4).bit_length() - 1
    return min(max(quarter, SEARCH_PERIOD), MAX_SEARCH_PERIOD)


_PERIODS: I64 = np.array([_period(num_idle) for num_idle in range(4 * MAX_SEARCH_PERIOD + 1)])


def _periods(num_idle: I64) -> I64:
    """``_period`` of several slots."""
    found: I64 = _PERIODS[np.minimum(num_idle, len(_PERIODS) - 1)]
    return found


def _spread(counts: I64, is_current: npt.NDArray[np.bool_]) -> I64:
    """Counts of the current rows among all rows; the others have none."""
    if len(counts) == len(is_current):
        return counts
    every: I64 = np.zeros(len(is_current), np.int64)
    every[is_current] = counts
    return every
