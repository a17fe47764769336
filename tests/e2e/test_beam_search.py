"""Beam search with a real engine, against a search that only asks for the next token of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api import LLM, BeamSearchParams, SamplingParams

PROMPTS = [[5, 17, 80, 33, 9], [40] * 40]
END = 2


def plain_search(llm: LLM, prompt: list[int], width: int, max_tokens: int, penalty: float) -> list[list[int]]:
    """The best sequences, each step a batch of prompts that hold the beams."""
    step = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * width, ignore_eos=True)
    beams: list[tuple[list[int], float]] = [(prompt, 0.0)]
    ended: list[tuple[list[int], float]] = []
    for _ in range(max_tokens):
        outputs = llm.generate([tokens for tokens, _ in beams], step, use_tqdm=False)
        longer = []
        for (tokens, total), output in zip(beams, outputs, strict=True):
            assert output.outputs[0].logprobs is not None
            position = output.outputs[0].logprobs[0]
            for token, described in sorted(position.items(), key=lambda item: item[1].rank or 0):
                if token == END:
                    ended.append((tokens, (total + described.logprob) / len(tokens) ** penalty))
                else:
                    longer.append(([*tokens, token], total + described.logprob))
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    ended += [(tokens, total / len(tokens) ** penalty) for tokens, total in beams]
    return [tokens for tokens, _ in sorted(ended, key=lambda beam: -beam[1])[:width]]


@pytest.mark.parametrize(
    "options", [{}, {"num_gpu_blocks_override": 12, "max_model_len": 128, "max_num_seqs": 6}], ids=["all", "preempted"]
)
def test_the_same_sequences_as_a_plain_search(tiny_model: Path, options: dict[str, Any]) -> None:
    """Also when requests are preempted, and whatever the client may ask for."""
    with LLM(str(tiny_model), dtype="float32", kv_cache_memory="64MiB", max_logprobs=8, **options) as llm:
        assert llm.get_tokenizer().eos_token_ids == (END,)
        for penalty in (1.0, 0.5):
            params = BeamSearchParams(beam_width=4, max_tokens=12, length_penalty=penalty)
            found = llm.beam_search(PROMPTS, params)
            for prompt, output in zip(PROMPTS, found, strict=True):
                expected = plain_search(llm, prompt, 4, 12, penalty)
                assert [sequence.tokens for sequence in output.sequences] == expected
                assert output.sequences[0].text == llm.get_tokenizer().decode(output.sequences[0].tokens)
            alone = llm.beam_search([PROMPTS[1]], params)[0]
            assert alone == found[1]
        wide = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=20, max_tokens=3, logprobs=1))
        assert len(wide[0].sequences) == 20
        assert all(len(position) in (1, 2) for position in wide[0].sequences[19].logprobs)


def test_one_beam_is_greedy(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", kv_cache_memory="64MiB") as llm:
        greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        output = llm.generate([PROMPTS[0]], greedy, use_tqdm=False)[0].outputs[0]
        params = BeamSearchParams(beam_width=1, max_tokens=20, ignore_eos=True)
        sequence = llm.beam_search([PROMPTS[0]], params)[0].sequences[0]
        assert sequence.tokens == PROMPTS[0] + output.token_ids
        with pytest.raises(ValueError, match="maximum context length"):
            llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=1, max_tokens=100_000))
