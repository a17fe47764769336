"""llama-index: OpenAILikeEmbedding and CohereEmbedding in a vector index, and CohereRerank behind it."""

from __future__ import annotations

import importlib.metadata
import os

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.schema import QueryBundle
from llama_index.embeddings.cohere import CohereEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.postprocessor.cohere_rerank import CohereRerank

MODEL = os.environ["OCTAVO_MODEL"]
URL = os.environ["OCTAVO_URL"]
TEXTS = ["Paris is the capital of France.", "Bread is baked in an oven.", "Octopuses have eight arms."]
QUESTION = "How many arms does an octopus have?"

openai = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key="none", embed_batch_size=2)
cohere = CohereEmbedding(model_name=MODEL, base_url=URL, api_key="none")
rerank = CohereRerank(model=MODEL, base_url=URL, api_key="none", top_n=1)
documents = [Document(text=text) for text in TEXTS]
for embedding in (openai, cohere):
    index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
    nodes = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    assert nodes[0].text == TEXTS[2], nodes
    (best,) = rerank.postprocess_nodes(list(reversed(nodes)), QueryBundle(QUESTION))
    assert best.text == TEXTS[2], best
one, other = openai.get_text_embedding(TEXTS[0]), cohere.get_text_embedding(TEXTS[0])
assert all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
print(f"llama-index-core {importlib.metadata.version('llama-index-core')}")
