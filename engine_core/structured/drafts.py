"""Grammars and rows of more than one token: what may stand at each position if the drafts before it hold."""

from __future__ import annotations

from collections.abc import Sequence

from engine_core.request import Request
from engine_core.structured.request_grammar import RequestGrammar, Verdict


def states_along(request: Request, drafts: Sequence[int], num_outputs: int) -> list[RequestGrammar]:
    """The states of a request's grammar before each position of a row, the request's own first.

    Args:
        request: Has a grammar.
        drafts: Tokens that may follow its output. What comes after one that cannot has no state.
        num_outputs: Tokens of its output.
    """
    assert request.grammar is not None
    states = [request.grammar]
    for place, draft in enumerate(drafts):
        state = states[-1].copy()
        if _ends(request, draft, num_outputs + place + 1) or state.accept(draft) is not Verdict.GOES_ON:
            break
        states.append(state)
    return states


def judge(request: Request, tokens: Sequence[int], num_outputs: int) -> tuple[int, Verdict]:
    """Lets a request's grammar have sampled tokens, in their order.

    Args:
        request: Has a grammar.
        tokens: At least one.
        num_outputs: Tokens of its output before them.

    Returns:
        How many of the tokens are part of the output, and what became of the last one that was looked at. A token that
        ends the output without a say of the grammar goes on, and nothing after it is looked at.
    """
    grammar = request.grammar
    assert grammar is not None
    for place, token in enumerate(tokens):
        if _ends(request, token, num_outputs + place + 1):
            return place + 1, Verdict.GOES_ON
        verdict = grammar.accept(token)
        if verdict is not Verdict.GOES_ON:
            return place + (verdict is Verdict.ENDED), verdict
    return len(tokens), Verdict.GOES_ON


def _ends(request: Request, token: int, num_outputs: int) -> bool:
    """Whether a token ends the output, as one of the request's stop tokens."""
    params = request.params
    is_stop = token in params.stop_token_ids or token in params.eos_token_ids
    return is_stop and num_outputs >= params.min_tokens


def mask_counts(
    counts: Sequence[int], problems: Sequence[tuple[int, str | None]]
) -> tuple[list[tuple[int, str | None]], list[int]]:
    """Which rows end where they are, and how many positions of each row have a mask that means something.

    Args:
        counts: Positions of each row.
        problems: Positions, counted over all rows, where no token can come, and why; see ``MaskBuilder.fill``.

    Returns:
        Rows that end at their first position, and why; and for each row its positions before one with a problem.
    """
    kept = list(counts)
    ended: list[tuple[int, str | None]] = []
    if problems:
        places = [(row, position) for row, count in enumerate(counts) for position in range(count)]
        for place, problem in problems:
            row, position = places[place]
            kept[row] = min(kept[row], position)
            if position == 0:
                ended.append((row, problem))
    return ended, kept
