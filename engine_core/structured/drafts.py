"""Grammars for rows with several tokens: what is allowed at each position if the drafts before it are accepted."""

from __future__ import annotations

from collections.abc import Sequence

from engine_core.request import Request
from engine_core.structured.request_grammar import RequestGrammar, Verdict


def states_along(request: Request, drafts: Sequence[int], num_outputs: int) -> list[RequestGrammar]:
    """The states of a request's grammar at each position of a row, starting with the current one.

    Args:
        request: A request with a grammar.
        drafts: Tokens proposed to follow its output. Positions after an invalid one have no state.
        num_outputs: Number of tokens in its output.
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
    """Feeds sampled tokens to a request's grammar, in order.

    Args:
        request: A request with a grammar.
        tokens: The sampled tokens, at least one.
        num_outputs: Number of tokens in its output before them.

    Returns:
        How many of the tokens belong to the output, and the verdict on the last one examined. A stop token that ends
        the output independently of the grammar counts as going on, and no token after it is examined.
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
    """Whether a token ends the output as one of the request's stop tokens."""
    params = request.params
    is_stop = token in params.stop_token_ids or token in params.eos_token_ids
    return is_stop and num_outputs >= params.min_tokens


def mask_counts(
    counts: Sequence[int], problems: Sequence[tuple[int, str | None]]
) -> tuple[list[tuple[int, str | None]], list[int]]:
    """Determines which rows end, and how many positions of each row have a valid mask.

    Args:
        counts: Number of positions per row.
        problems: Positions, numbered across all rows, at which no token is possible, with the reason; see
            ``MaskBuilder.fill``.

    Returns:
        Rows that end at their first position, with the reason; and for each row the number of positions before its
        first problem.
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
