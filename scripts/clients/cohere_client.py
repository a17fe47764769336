"""cohere: embed and rerank of ClientV2, plain and asynchronous."""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import os
from typing import Any

import cohere

MODEL = os.environ["OCTAVO_MODEL"]
DOCUMENTS = ["Paris is the capital of France.", "Bread is baked in an oven.", "Octopuses have eight arms."]
SERVER: dict[str, Any] = {"api_key": "none", "base_url": os.environ["OCTAVO_URL"]}


def product(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


client = cohere.ClientV2(**SERVER)
reply = client.embed(model=MODEL, texts=DOCUMENTS, input_type="search_document", embedding_types=["float"])
vectors = reply.embeddings.float_
assert vectors and len(vectors) == 3 and reply.texts == DOCUMENTS
assert all(math.isclose(product(vector, vector), 1, abs_tol=1e-4) for vector in vectors)
assert reply.meta and reply.meta.billed_units and reply.meta.billed_units.input_tokens
query = client.embed(model=MODEL, texts=["a baker"], input_type="search_query", embedding_types=["float"])
assert query.embeddings.float_
scores = [product(query.embeddings.float_[0], vector) for vector in vectors]
assert max(scores) == scores[1], scores

ranked = client.rerank(model=MODEL, query="How many arms does an octopus have?", documents=DOCUMENTS, top_n=2)
assert [result.index for result in ranked.results][0] == 2 and len(ranked.results) == 2
assert ranked.results[0].relevance_score > ranked.results[1].relevance_score

try:
    client.embed(model=MODEL, texts=[], input_type="search_query", embedding_types=["float"])
except cohere.errors.BadRequestError as error:
    assert "texts" in str(error.body)
else:
    raise AssertionError("no texts were embedded")


async def asynchronous() -> list[float]:
    async with cohere.AsyncClientV2(**SERVER) as other:
        reply = await other.embed(model=MODEL, texts=["a baker"], input_type="search_query", embedding_types=["float"])
        assert reply.embeddings.float_
        return list(reply.embeddings.float_[0])


assert asyncio.run(asynchronous()) == query.embeddings.float_[0]
print(f"cohere {importlib.metadata.version('cohere')}")
