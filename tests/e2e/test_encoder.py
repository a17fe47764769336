"""A server whose model generates nothing: embeddings of an encoder, with the openai package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from api import LLM
from tests import tiny
from tests.e2e.server import Server

TEXTS = ["one text", "another, which is a little longer", "a third", *(f"number {i} " * (1 + i % 9) for i in range(40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.copy_of(tiny.checkpoint("bert"), tmp_path_factory.mktemp("encoder") / "model")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": True}))
    modules = [
        {"path": path, "type": f"models.{path[2:] or 'Transformer'}"} for path in ("", "1_Pooling", "2_Normalize")
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model", str(folder), "--served-model-name", "encoder") as running:
        yield running


def test_embeddings(server: Server, folder: Path) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        together = client.embeddings.create(model="encoder", input=TEXTS)
        alone = client.embeddings.create(model="encoder", input=TEXTS[1]).data[0].embedding
        assert together.data[1].embedding == alone and np.linalg.norm(alone) == pytest.approx(1, abs=1e-6)
        assert client.embeddings.create(model="encoder", input=TEXTS[1].upper()).data[0].embedding == alone
        short = client.embeddings.create(model="encoder", input=TEXTS[1], dimensions=100).data[0].embedding
        assert (len(alone), len(short)) == (128, 100), "two vectors behind each other"
        with pytest.raises(openai.BadRequestError, match="between 1 and 128"):
            client.embeddings.create(model="encoder", input=TEXTS[1], dimensions=129)
        with pytest.raises(openai.BadRequestError, match="128 tokens"):
            client.embeddings.create(model="encoder", input=[TEXTS[0], "x" * 5000])
        cut = {"truncate_prompt_tokens": -1}
        client.embeddings.create(model="encoder", input="x" * 5000, extra_body=cut)
        named = client.embeddings.create(model="encoder", input=TEXTS[0], extra_body={"prompt_name": "query"})
        written = client.embeddings.create(model="encoder", input=f"query: {TEXTS[0]}")
        assert named.data[0].embedding == written.data[0].embedding
        for dimensions, status in ((64, 200), (65, 400)):  # vectors of tokens are not joined
            fields = {"input": TEXTS[1], "task": "token_embed", "dimensions": dimensions}
            answer = server.post("/pooling", {"model": "encoder", **fields})
            assert answer.status_code == status, answer.text
        assert "between 1 and 64, the size of the model's vectors of tokens" in answer.text
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="encoder", prompt="a", max_tokens=1)
    with LLM(str(folder)) as llm:
        (offline,) = llm.embed(TEXTS[1], use_tqdm=False)
        assert offline.outputs.embedding == alone
        with pytest.raises(ValueError, match="no classifier"):
            llm.classify("a")
    assert server.get("/health").status_code == 200
