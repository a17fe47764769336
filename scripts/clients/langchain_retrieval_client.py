"""langchain: OpenAIEmbeddings, CohereEmbeddings and CohereRerank; a vector store with either."""

from __future__ import annotations

import importlib.metadata
import os

from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

MODEL = os.environ["OCTAVO_MODEL"]
URL = os.environ["OCTAVO_URL"]
DOCUMENTS = ["Paris is the capital of France.", "Bread is baked in an oven.", "Octopuses have eight arms."]
QUESTION = "How many arms does an octopus have?"

# By default it cuts texts with tiktoken's tables of OpenAI's models, and asks the internet for them.
openai = OpenAIEmbeddings(model=MODEL, base_url=f"{URL}/v1", api_key="none", check_embedding_ctx_length=False)
cohere = CohereEmbeddings(model=MODEL, base_url=URL, cohere_api_key="none")
for embeddings in (openai, cohere):
    assert isinstance(embeddings, Embeddings)
    store = InMemoryVectorStore(embeddings)
    store.add_texts(DOCUMENTS)
    (found,) = store.similarity_search(QUESTION, k=1)
    assert found.page_content == DOCUMENTS[2], found
one, other = openai.embed_documents(DOCUMENTS), cohere.embed_documents(DOCUMENTS)
assert all(abs(a - b) < 1e-6 for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))

reranker = CohereRerank(model=MODEL, base_url=URL, cohere_api_key="none", top_n=2)
ranked = reranker.rerank(DOCUMENTS, QUESTION)
assert [result["index"] for result in ranked][0] == 2 and len(ranked) == 2
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("langchain-openai", "langchain-cohere")]
print(", ".join(versions))
