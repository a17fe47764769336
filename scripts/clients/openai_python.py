"""openai-python: chat, completions, embeddings, models, streams, tools, typed answers; blocking and asynchronous."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import openai
from pydantic import BaseModel

MODEL = os.environ["OCTAVO_MODEL"]
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 16}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


class Capital(BaseModel):
    country: str
    is_european: bool


def blocking() -> None:
    client = openai.OpenAI(max_retries=0)
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert whole.choices[0].message.content and whole.usage
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    usage = chunks[-1].usage  # but for what came from the cache it is the same
    assert usage and usage.completion_tokens == whole.usage.completion_tokens
    completion = client.completions.create(prompt=["Hello", "The sky is"], n=2, model=MODEL, max_tokens=4, logprobs=2)
    assert len(completion.choices) == 4 and completion.choices[0].logprobs
    text = "".join(c.choices[0].text for c in client.completions.create(prompt="Hello", stream=True, **GREEDY))
    assert text == client.completions.create(prompt="Hello", **GREEDY).choices[0].text
    vectors = client.embeddings.create(model=MODEL, input=["a", "b"]).data
    assert len(vectors) == 2 and len(vectors[0].embedding) == len(vectors[1].embedding) > 1
    logprobs = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    content = logprobs.choices[0].logprobs
    assert content and content.content and len(content.content[0].top_logprobs) == 3
    for options, kind in (
        ({"temperature": 9}, openai.BadRequestError),
        ({"model": "another"}, openai.NotFoundError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(messages=MESSAGES, **{**GREEDY, **options})
            raise AssertionError(f"{options} was accepted")
        except kind as error:
            assert error.param, error


def helpers() -> None:
    """What the package builds upon the plain calls."""
    client = openai.OpenAI(max_retries=0)
    long = {**GREEDY, "max_tokens": 64}
    parsed = client.chat.completions.parse(messages=MESSAGES, response_format=Capital, **long)
    assert isinstance(parsed.choices[0].message.parsed, Capital), parsed
    with client.chat.completions.stream(messages=MESSAGES, response_format=Capital, **long) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    called = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice=choice, **long)
    (call,) = called.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    chunks = client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice=choice, stream=True, **long)
    deltas = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or []]
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert json.loads(arguments) == json.loads(call.function.arguments)
    history = [
        *MESSAGES,
        called.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert client.chat.completions.create(messages=history, tools=TOOLS, **GREEDY).choices[0].message
    raw = client.chat.completions.with_raw_response.create(messages=MESSAGES, **GREEDY)
    assert raw.headers["content-type"] == "application/json" and raw.parse().choices


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(max_retries=0) as client:
        expected = (await client.chat.completions.create(messages=MESSAGES, **GREEDY)).choices[0].message.content

        async def ask(streams: bool) -> str | None:
            if not streams:
                answer = await client.chat.completions.create(messages=MESSAGES, **GREEDY)
                text: str | None = answer.choices[0].message.content
                return text
            stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        answers = await asyncio.gather(*(ask(bool(number % 2)) for number in range(16)))
        assert set(answers) == {expected}
        stream = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=500, stream=True)
        async for _ in stream:
            break
        await stream.close()


blocking()
helpers()
asyncio.run(asynchronous())
print(f"openai {openai.__version__}")
