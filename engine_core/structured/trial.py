"""Jobs of a helper process: tries to compile a grammar, compute its first mask and start it within limits.

The engine core does the same only afterwards. It could not stop a compilation that takes all memory or never returns,
and a stack overflow would kill it.
"""

from __future__ import annotations

import msgspec

from engine_core.messages import GrammarSpec, Message, ResolvedParams, SetVocabulary
from engine_core.structured.cost import is_cheap
from engine_core.structured.examples import pattern_examples
from engine_core.structured.grammar import GrammarError, compile_grammar, grammar_text, short_error
from engine_core.structured.request_grammar import RequestGrammar
from engine_core.structured.vocabulary import Vocabulary
from executor.helper import Helper, HelperLimits, resident_bytes

STACK_BYTES = 2 << 20
"""Stack of a trial. The core's own threads have several times as much, since their frames may differ."""
LIMITS = HelperLimits(
    cpu_seconds=3.0, deadline=10.0, memory_bytes=64 << 20, stack_bytes=STACK_BYTES, max_output_bytes=4 << 20
)
JOBS = {
    "set_vocabulary": "engine_core.structured.trial:set_vocabulary",
    "try_grammar": "engine_core.structured.trial:try_grammar",
}
_LONGEST_OUTPUT = 1 << 20
_SMALL_VOCABULARY = 1 << 16

_vocabulary: Vocabulary | None = None


class TrialVocabulary(Message, frozen=True):
    """Argument of ``set_vocabulary``."""

    vocabulary: SetVocabulary
    size: int


class Proof(Message, frozen=True):
    """Result for a grammar that passed."""

    text: str
    """The grammar in llguidance's dialect of Lark, if converted from another notation: the conversion may be the most
    expensive part."""
    num_bytes: int
    """Memory of the compiled grammar."""


def grammar_helper(vocabulary: SetVocabulary, size: int) -> Helper:
    """Creates a helper for trials with a vocabulary."""
    # Each takes 70 MB with 49,000 tokens, 137 MB with 151,000.
    num_processes = 2 if size <= _SMALL_VOCABULARY else 1
    helper = Helper("octavo grammar helper", JOBS, LIMITS, num_processes=num_processes, max_waiting=4096)
    helper.prepare("set_vocabulary", msgspec.msgpack.encode(TrialVocabulary(vocabulary, size)))
    return helper


def set_vocabulary(data: bytes) -> bytes:
    """Sets the vocabulary of all later trials in this process."""
    global _vocabulary
    message = msgspec.msgpack.decode(data, type=TrialVocabulary)
    _vocabulary = Vocabulary(message.vocabulary, message.size)
    return b""


def try_grammar(data: bytes) -> bytes:
    """Compiles a ``GrammarSpec``, computes its first mask and searches for its first closing path.

    Returns:
        A ``Proof``.

    Raises:
        GrammarError: The grammar cannot be used.
    """
    spec = msgspec.msgpack.decode(data, type=GrammarSpec)
    assert _vocabulary is not None
    before = resident_bytes()
    is_cheap(spec)  # rejects deep nesting with a better message
    text = grammar_text(spec)
    matcher = compile_grammar(spec, _vocabulary, text)
    first = matcher.deep_copy()
    first.compute_bitmask()
    if first.is_error():
        raise GrammarError(short_error(first.get_error()))
    params = ResolvedParams(max_tokens=_LONGEST_OUTPUT, eos_token_ids=_vocabulary.end_tokens)
    examples = pattern_examples(spec, _vocabulary)
    grammar = RequestGrammar(matcher.deep_copy(), _vocabulary, params, completes=spec.completes, examples=examples)
    grammar.start(_LONGEST_OUTPUT)
    return msgspec.msgpack.encode(
        Proof(text=text if spec.kind == "grammar" else "", num_bytes=resident_bytes() - before)
    )
