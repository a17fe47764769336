"""langchain: OpenAIEmbeddings in a vector store, and CohereRerank behind it.

CohereEmbeddings asks the first version of Cohere's API, which is not served.
"""

from __future__ import annotations

import importlib.metadata
import os

from langchain_cohere import CohereRerank
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings

MODEL = os.environ["OCTAVO_MODEL"]
URL = os.environ["OCTAVO_URL"]
DOCUMENTS = ["Paris is the capital of France.", "Bread is baked in an oven.", "Octopuses have eight arms."]
QUESTION = "How many arms does an octopus have?"

# By default it cuts texts with tiktoken's tables of OpenAI's models, and asks the internet for them.
embeddings = OpenAIEmbeddings(model=MODEL, base_url=f"{URL}/v1", api_key="none", check_embedding_ctx_length=False)
store = InMemoryVectorStore(embeddings)
store.add_texts(DOCUMENTS)
(found,) = store.similarity_search(QUESTION, k=1)
assert found.page_content == DOCUMENTS[2], found

reranker = CohereRerank(model=MODEL, base_url=URL, cohere_api_key="none", top_n=2)
ranked = reranker.rerank(DOCUMENTS, QUESTION)
assert [result["index"] for result in ranked][0] == 2 and len(ranked) == 2
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("langchain-openai", "langchain-cohere")]
print(", ".join(versions))
