"""llama-index: OpenAILikeEmbedding in a vector index, and CohereRerank behind it.

CohereEmbedding takes the names of Cohere's own models only.
"""

from __future__ import annotations

import importlib.metadata
import os

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.schema import QueryBundle
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.postprocessor.cohere_rerank import CohereRerank

MODEL = os.environ["OCTAVO_MODEL"]
URL = os.environ["OCTAVO_URL"]
TEXTS = ["Paris is the capital of France.", "Bread is baked in an oven.", "Octopuses have eight arms."]
QUESTION = "How many arms does an octopus have?"

embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key="none", embed_batch_size=2)
rerank = CohereRerank(model=MODEL, base_url=URL, api_key="none", top_n=1)
documents = [Document(text=text) for text in TEXTS]
index = VectorStoreIndex.from_documents(documents, embed_model=embedding)
nodes = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
assert nodes[0].text == TEXTS[2], nodes
(best,) = rerank.postprocess_nodes(list(reversed(nodes)), QueryBundle(QUESTION))
assert best.text == TEXTS[2], best
print(f"llama-index-core {importlib.metadata.version('llama-index-core')}")
