"""litellm with its provider for vLLM servers: chat, streams, tools, text completion, embeddings, rerank, errors."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices

import litellm

URL = os.environ["OPENAI_BASE_URL"]
MODEL = f"hosted_vllm/{os.environ['OCTAVO_MODEL']}"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
COMMON: dict[str, Any] = {"model": MODEL, "api_base": URL, "api_key": "none", "num_retries": 0, "max_retries": 0}
GREEDY: dict[str, Any] = {**COMMON, "temperature": 0, "max_tokens": 16}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}

whole = litellm.completion(messages=MESSAGES, **GREEDY)
text = whole.choices[0].message.content
assert text and whole.usage.completion_tokens
chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
assert litellm.stream_chunk_builder(chunks).choices[0].message.content == text


async def asynchronous() -> None:
    answers = await asyncio.gather(*(litellm.acompletion(messages=MESSAGES, **GREEDY) for _ in range(8)))
    assert {answer.choices[0].message.content for answer in answers} == {text}
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **GREEDY)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text


asyncio.run(asynchronous())

choice = {"type": "function", "function": {"name": "weather"}}
called = litellm.completion(messages=MESSAGES, tools=[TOOL], tool_choice=choice, **{**GREEDY, "max_tokens": 64})
assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")

completion = litellm.text_completion(prompt="Hello", **GREEDY)
assert completion.choices[0].text

vectors = litellm.embedding(input=["a", "b"], **COMMON)
assert len(vectors.data) == 2 and len(vectors.data[0]["embedding"]) > 1

ranked = litellm.rerank(
    model=MODEL, api_base=os.environ["OCTAVO_URL"], api_key="none", query="a", documents=["b", "a"], top_n=1
)
assert ranked.results[0]["index"] == 1, ranked

for options, kind in (
    ({"temperature": 9.0}, litellm.BadRequestError),
    ({"model": "hosted_vllm/another"}, litellm.NotFoundError),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, litellm.ContextWindowExceededError),
):
    try:
        litellm.completion(**{"messages": MESSAGES, **GREEDY, **options})
        raise AssertionError(f"{options} was accepted")
    except kind:
        pass
print(f"litellm {importlib.metadata.version('litellm')}")
