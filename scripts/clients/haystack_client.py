"""haystack: a pipeline of OpenAI's embedders, a document store and Cohere's ranker; Cohere's embedders."""

from __future__ import annotations

import importlib.metadata
import os

from haystack import Document, Pipeline
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import Secret
from haystack_integrations.components.embedders.cohere import CohereTextEmbedder
from haystack_integrations.components.rankers.cohere import CohereRanker

MODEL = os.environ["OCTAVO_MODEL"]
URL = os.environ["OCTAVO_URL"]
KEY = Secret.from_token("none")
TEXTS = ["Paris is the capital of France.", "Bread is baked in an oven.", "Octopuses have eight arms."]
QUESTION = "How many arms does an octopus have?"

documents = OpenAIDocumentEmbedder(model=MODEL, api_base_url=f"{URL}/v1", api_key=KEY, progress_bar=False)
store = InMemoryDocumentStore(embedding_similarity_function="cosine")
store.write_documents(documents.run([Document(content=text) for text in TEXTS])["documents"])
pipeline = Pipeline()
pipeline.add_component("embedder", OpenAITextEmbedder(model=MODEL, api_base_url=f"{URL}/v1", api_key=KEY))
pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=2))
pipeline.add_component("ranker", CohereRanker(model=MODEL, api_base_url=URL, api_key=KEY, top_k=1))
pipeline.connect("embedder.embedding", "retriever.query_embedding")
pipeline.connect("retriever", "ranker")
found = pipeline.run({"embedder": {"text": QUESTION}, "ranker": {"query": QUESTION}})
(best,) = found["ranker"]["documents"]
assert best.content == TEXTS[2], best

one = OpenAITextEmbedder(model=MODEL, api_base_url=f"{URL}/v1", api_key=KEY).run(QUESTION)["embedding"]
other = CohereTextEmbedder(model=MODEL, api_base_url=URL, api_key=KEY).run(QUESTION)["embedding"]
assert all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
print(f"haystack-ai {importlib.metadata.version('haystack-ai')}")
