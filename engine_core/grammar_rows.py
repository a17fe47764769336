"""The constrained rows of a step: what their grammars force, and their states at each position."""

from __future__ import annotations

import numpy as np

from engine_core.in_flight import Bools, InFlight
from engine_core.messages import I32, i32, u8
from engine_core.slot_table import SlotTable
from engine_core.step_tokens import StepTokens
from engine_core.structured.drafts import judge, states_along
from engine_core.structured.request_grammar import RequestGrammar, Verdict
from executor.messages import ForcedDrafts, ModelRunnerOutput


def forced_drafts(table: SlotTable, slots: I32) -> tuple[ForcedDrafts, ...]:
    """What grammars force after the tokens that are known: the next token, which a step in flight may be sampling, and
    drafts behind it.

    Args:
        table: The running requests.
        slots: int32 [n]: slots of constrained rows.
    """
    found: list[ForcedDrafts] = []
    for slot in slots[table.allowances[slots] > 0].tolist():
        request = table.request(slot)
        assert request.grammar is not None
        tokens = [] if request.params.num_speculative_tokens == 0 else request.grammar.likely_tokens()
        if tokens:
            found.append(ForcedDrafts(slot, int(table.num_known[slot]), np.array(tokens, np.int32).tobytes()))
    return tuple(found)


def grammar_states(table: SlotTable, step: InFlight) -> list[list[RequestGrammar | None]]:
    """The grammar states of a step's constrained rows at each of their positions; None if the request is gone."""
    states: list[list[RequestGrammar | None]] = []
    forced = {drafts.slot: drafts for drafts in step.forced_drafts}
    for row in step.grammar_rows.tolist():
        request = table.owner(step, row)
        if request is None:
            states.append([None])
            continue
        slot = request.slot
        known = int(table.num_known[slot])
        drafts = table.drafts[slot, : table.num_drafts[slot]]
        if slot in forced:
            follow = forced[slot].after(table.token_ids[slot, :known])
            drafts = follow if len(follow) else drafts
        num_allowed = 0 if step.allowances is None else int(step.allowances[row])
        num_outputs = known - request.num_prompt_tokens
        states.append([*states_along(request, drafts[:num_allowed].tolist(), num_outputs)])
    return states


def keep_drafts(table: SlotTable, step: InFlight, new: StepTokens, result: ModelRunnerOutput, current: Bools) -> None:
    """Records a worker's drafts for rows whose masks will depend on them."""
    counts = u8(result.num_draft_tokens).astype(np.int64)
    slots = step.slots[new.rows]
    wanted = current[new.rows] & table.has_grammar[slots]
    if wanted.any():
        drafts = i32(result.draft_token_ids)[np.repeat(wanted, counts)]
        table.note_drafts(slots[wanted], counts[wanted], drafts)


def judge_rows(table: SlotTable, step: InFlight, new: StepTokens) -> dict[int, Verdict]:
    """Feeds a step's tokens to their grammars and keeps the accepted ones of each row.

    The worker has sampled a rejected token and continues from it; it is corrected when the request returns, as if
    it had been preempted.

    Returns:
        By row: the verdict on its last token, unless the output simply continues.
    """
    verdicts: dict[int, Verdict] = {}
    for place, row in enumerate(step.grammar_rows.tolist()):
        sample = new.sample(row)
        tokens = new.of(sample)
        if not tokens:
            continue
        request = table.request(int(step.slots[row]))
        num_masks = step.num_masks[place] if step.num_masks else 1
        num_outputs = int(table.num_known[request.slot]) - request.num_prompt_tokens
        kept, verdict = judge(request, tokens[:num_masks], num_outputs)
        if verdict is Verdict.GOES_ON and kept == num_masks < len(tokens):
            verdict = Verdict.REJECTED  # later tokens were sampled without a mask
        new.kept[sample] = kept
        if verdict is not Verdict.GOES_ON:
            verdicts[row] = verdict
    return verdicts
