"""langchain-openai: ChatOpenAI, OpenAI and OpenAIEmbeddings; streams, batches, tools, structured output."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

COMMON: dict[str, Any] = {
    "model": os.environ["OCTAVO_MODEL"],
    "base_url": os.environ["OPENAI_BASE_URL"],
    "api_key": "none",
    "max_retries": 0,
}
MESSAGES = [SystemMessage("You answer briefly."), HumanMessage("What is the capital of France?")]


class weather(BaseModel):  # noqa: N801
    """The weather of a city."""

    city: str


class Capital(BaseModel):
    country: str
    is_european: bool


chat = ChatOpenAI(**COMMON, temperature=0, max_tokens=24)
answer = chat.invoke(MESSAGES)
assert answer.content and answer.usage_metadata and answer.usage_metadata["output_tokens"]
chunks = list(chat.stream(MESSAGES, stream_usage=True))
assert "".join(str(chunk.content) for chunk in chunks) == answer.content
assert {reply.content for reply in chat.batch([MESSAGES] * 4)} == {answer.content}


async def asynchronous() -> str:
    return "".join([str(chunk.content) async for chunk in chat.astream(MESSAGES)])


assert asyncio.run(asynchronous()) == answer.content

long = ChatOpenAI(**COMMON, temperature=0, max_tokens=64)
called = long.bind_tools([weather], tool_choice="weather").invoke(MESSAGES)
assert called.tool_calls[0]["name"] == "weather" and "city" in called.tool_calls[0]["args"]
for method in ("json_schema", "function_calling"):
    parsed = long.with_structured_output(Capital, method=method).invoke(MESSAGES)
    assert isinstance(parsed, Capital), (method, parsed)

llm = OpenAI(**COMMON, temperature=0, max_tokens=8)
assert llm.invoke("Hello") == "".join(llm.stream("Hello"))

# By default it cuts texts with tiktoken's tables of OpenAI's models, and asks the internet for them.
embeddings = OpenAIEmbeddings(**COMMON, check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(["a", "b"])
assert len(vectors) == 2 and embeddings.embed_query("a") == vectors[0]
print(f"langchain-openai {importlib.metadata.version('langchain-openai')}")
