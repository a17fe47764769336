"""Lets a model call a function: python tools.py [URL]

The server needs --enable-auto-tool-choice --tool-call-parser hermes (or the parser of your model).
"""

import json
import sys
import urllib.request
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Berlin", "Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def weather(city: str) -> str:
    return f"It is sunny in {city}, 21 degrees."


def ask(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The model's next message."""
    request = {"messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 64, **fields}
    call = urllib.request.Request(
        f"{URL}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call) as response:
        message: dict[str, Any] = json.load(response)["choices"][0]["message"]
    return message


messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
# "required" forces a call, for small models; with "auto", the default, the model decides.
message = ask(messages, tool_choice="required")
messages.append(message)
for tool_call in message["tool_calls"]:
    arguments = json.loads(tool_call["function"]["arguments"])
    result = weather(**arguments)
    print(f"called {tool_call['function']['name']}({arguments}) -> {result}")
    messages.append({"role": "tool", "tool_call_id": tool_call["id"], "content": result})
print("answer:", ask(messages, tool_choice="none")["content"])
