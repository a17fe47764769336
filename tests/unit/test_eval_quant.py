"""``octavo eval-quant``: the figures that it computes of what engines answer, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest

from api.commands import eval_quant
from api.commands.eval_quant import Settings, divergence, engine_options, read_texts, row_options, run, windows
from api.errors import EngineDeadError
from api.flags import ConfigError
from api.model.tokenizer import Tokenizer
from api.params.sampling import SamplingParams
from tests.fakes import tiny_tokenizer


class FakeEngine:
    """Gives each token of a prompt one probability, and the rest to token 0."""

    weight_bytes = 1_000_000

    def __init__(self, share: float) -> None:
        self.share = share

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None: ...

    def get_tokenizer(self) -> Tokenizer:
        return tiny_tokenizer()

    def generate(self, prompts: Sequence[Any], params: SamplingParams, *, use_tqdm: bool = True) -> list[Any]:
        own, other = math.log(self.share), math.log(1 - self.share)
        metrics = SimpleNamespace(first_token_ts=10.0, last_token_ts=12.0, num_generation_tokens=params.max_tokens)
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                prompt_logprobs=[
                    None,
                    *(
                        {token: SimpleNamespace(logprob=own), token + 1: SimpleNamespace(logprob=other)}
                        for token in prompt["prompt_token_ids"][1:]
                    ),
                ],
                metrics=metrics,
            )
            for prompt in prompts
        ]


SHARES = {"none": 0.5, "int8": 0.4, "int4": 0.25}


def make(options: Mapping[str, Any]) -> FakeEngine:
    assert options["max_model_len"] == 64 and options["enable_prefix_caching"] is False
    if options["quantization"] == "fp8":
        raise EngineDeadError("no such format")
    return FakeEngine(SHARES[options["quantization"]])


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text("abcdefgh" * 8)
    settings = Settings(text_file=str(file), formats="bf16,int8,fp8,int4@float", window=10, json=str(out))
    assert run(make, {"max_model_len": 64}, settings) == 1  # one of the formats failed
    captured = capsys.readouterr()
    assert "octavo: fp8: no such format" in captured.err
    assert [row.split()[0] for row in captured.out.splitlines()[1:4]] == ["bf16", "int8", "int4@float"]
    first, int8, int4 = json.loads(out.read_text())["results"]
    assert (first["change"], first["kl"], first["same_top"]) == (0, 0, 1)
    assert math.isclose(first["perplexity"], 2) and math.isclose(int4["nll"], math.log(4))
    assert math.isclose(int8["change"], math.log(2.5) / math.log(2) - 1) and int8["same_top"] == 0
    assert math.isclose(int8["kl"], 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel_tol=1e-6)
    assert int8["change_error"] < 1e-9 and int8["tokens_per_second"] == 127 / 2 and int8["weight_bytes"] == 1_000_000


def test_divergence_is_at_most_that_of_all_tokens() -> None:
    reference, other = [0.5, 0.2, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2]
    full = sum(share * math.log(share / value) for share, value in zip(reference, other, strict=True))
    logs = [dict(enumerate(map(math.log, shares))) for shares in (reference, other)]
    assert math.isclose(divergence(*logs), full, abs_tol=1e-6)
    seen = divergence({0: logs[0][0], 1: logs[0][1]}, {0: logs[1][0], 2: logs[1][2]})
    assert 0 < seen < full and divergence(logs[0], logs[0]) == 0


def test_rows() -> None:
    assert row_options("bf16") == {"dtype": "bfloat16", "quantization": "none"}
    assert row_options("int4@int8") == {"quantization": "int4", "quantized_activations": "int8"}
    assert row_options("auto@float") == {"quantized_activations": "float"}
    assert row_options("x/y-Q4_0.gguf") == {"model": "x/y-Q4_0.gguf"}
    assert row_options("int8@float+int4") == {
        "quantization": "int8",
        "quantized_activations": "float",
        "kv_cache_dtype": "int4",
    }
    assert row_options("x/c+d.gguf") == {"model": "x/c+d.gguf"}
    with pytest.raises(ConfigError, match="--formats: a name is empty"):
        row_options("")


def test_only_int4_uses_an_imatrix() -> None:
    base = {"imatrix": "file", "seed": 1}
    assert engine_options(base, row_options("int4"))["imatrix"] == "file"
    assert "imatrix" not in engine_options(base, row_options("int8")) and base["imatrix"] == "file"


def test_there_are_no_drafts_unless_asked_for() -> None:
    assert engine_options({"speculative_config": None}, {})["speculative_config"] == {"method": "none"}
    drafts = {"speculative_config": {"method": "ngram"}}
    assert engine_options(drafts, {})["speculative_config"] == {"method": "ngram"}


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"question": "two", "answer": "three"}\n')
    assert read_texts(str(file)) == ["one", "two\nthree"]
    file.write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 1: expected text, or question and answer"):
        read_texts(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        read_texts(str(tmp_path / "none"))


def test_windows() -> None:
    tokenizer = tiny_tokenizer()
    text = "abcdefgh" * 4
    count = len(tokenizer.encode(text, add_special_tokens=False))
    before, _ = tokenizer.added_around(True)
    pieces = windows([text, text], tokenizer, 0, 5 + before)
    assert sum(len(piece) - before for piece in pieces) >= 2 * count - 2 and max(map(len, pieces)) == 5 + before
    few = windows([text, text], tokenizer, 7, 100)
    assert sum(len(piece) - before for piece in few) == 7


def test_a_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_quant, "find_spec", lambda name: None)
    settings = Settings(text_file="x", plot="x.png")
    with pytest.raises(ConfigError, match="--plot needs matplotlib: pip install matplotlib"):
        run(make, {}, settings)
    assert "matplotlib" not in sys.modules
