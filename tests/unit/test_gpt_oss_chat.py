"""gpt-oss from its chat template to the client and back: effort, tools, reasoning before a call, and its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from api.config import ServerConfig
from api.model.chat_template import ChatTemplate
from api.model.files import with_parsers
from engine_core.messages import ResolvedParams
from tests.fakes import MODEL, FakeServer
from tests.routes import CHATS, reply_of
from tests.scripted import SIZE, ScriptedModel
from tests.unit.conftest import Api

TEMPLATE = """
{%- macro function(tool) -%}
type {{ tool.name }} = (_: {{ tool.parameters.properties | list | join(", ") }}) => any;
{%- endmacro -%}
{{- "<|start|>system<|message|>Year " + strftime_now("%Y")[:1] }}
{{- "\\nReasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") }}
{{- "\\n# Valid channels: analysis, commentary, final.<|end|>" }}
{%- set told = messages[0].role in ("developer", "system") %}
{{- "<|start|>developer<|message|>" + (messages[0].content if told else "") }}
{%- if tools %}{{- "\\nnamespace functions {" }}
{%- for tool in tools %}{{- function(tool.function) }}{% endfor %}{{- "}" }}{% endif %}
{{- "<|end|>" }}
{%- set called = namespace(name=none) %}
{%- for message in (messages[1:] if told else messages) %}
    {%- if message.role == "assistant" and "tool_calls" in message %}
        {%- if message.content and message.thinking %}
            {{- raise_exception("Cannot pass both content and thinking with tool calls") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start|>assistant<|channel|>analysis<|message|>" + (message.thinking or message.content) + "<|end|>" }}
        {{- "<|start|>assistant to=" }}
        {{- "functions." + call.name + "<|channel|>commentary json<|message|>" + call.arguments | tojson + "<|call|>" }}
        {%- set called.name = call.name %}
    {%- elif message.role == "tool" %}
        {{- "<|start|>functions." + called.name + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- elif message.role == "assistant" %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- else %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{% endif %}
"""
"""As gpt-oss's own: of earlier reasoning it keeps what precedes a call, and it knows one call a message."""

SPECIAL = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
CALL = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
    '<|constrain|>json<|message|>{"city": "Rome"}<|call|>'
)
FINAL = "<|channel|>analysis<|message|>Good.<|end|><|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>"
HEAD = (
    "<|start|>system<|message|>Year 2\nReasoning: high\n# Valid channels: analysis, commentary, final.<|end|>"
    "<|start|>developer<|message|>Be kind.\nnamespace functions {type weather = (_: city) => any;}<|end|>"
    "<|start|>user<|message|>Rome?<|end|>"
)
TURN = (
    "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>"
    '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
    '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|>'
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
USER = {"role": "user", "content": "Rome?"}


def body(route: str, has_result: bool) -> tuple[str, dict[str, Any]]:
    """A question, maybe with the call that it led to and the call's result."""
    if route == "chat":
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        more: list[Any] = [
            {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]
        tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
        messages = [{"role": "developer", "content": "Be kind."}, USER, *(more if has_result else [])]
        return "/v1/chat/completions", {"messages": messages, "tools": [tool], "reasoning_effort": "high"}
    if route == "messages":
        thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
        use = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}}
        result = {"type": "tool_result", "tool_use_id": "1", "content": "sunny"}
        more = [{"role": "assistant", "content": [thought, use]}, {"role": "user", "content": [result]}]
        fields = {"model": MODEL, "max_tokens": 500, "system": "Be kind.", "output_config": {"effort": "high"}}
        tool = {"name": "weather", "input_schema": PARAMETERS}
        return "/v1/messages", {**fields, "messages": [USER, *(more if has_result else [])], "tools": [tool]}
    more = [
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "1", "output": "sunny"},
    ]
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    fields = {"instructions": "Be kind.", "reasoning": {"effort": "high"}, "tools": [tool]}
    return "/v1/responses", {**fields, "input": [USER, *(more if has_result else [])]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", CHATS)
async def test_a_call_and_its_result(route: str, stream: bool) -> None:
    config = with_parsers(ServerConfig(enable_auto_tool_choice=True, reasoning_parser="auto"), TEMPLATE)
    assert (config.tool_call_parser, config.reasoning_parser) == ("harmony", "harmony")
    tokenizer = ScriptedModel(special=SPECIAL, chat_template=TEMPLATE).tokenizer()
    tokenizer.eos_token_ids = tuple(tokenizer.encode("<|return|><|call|>"))

    def says(prompt: list[int], params: ResolvedParams) -> Iterator[int]:
        text = CALL if tokenizer.decode(prompt, False) == f"{HEAD}<|start|>assistant" else FINAL
        yield from tokenizer.encode(text)

    server = FakeServer(config, says, chat_template=TEMPLATE, tokenizer=tokenizer, vocab_size=SIZE)
    api = Api(server)
    for has_result in (False, True):
        path, fields = body(route, has_result)
        response = await api.post(path, {**fields, "stream": stream, "temperature": 0})
        assert response.status_code == 200, response.text
        reply = reply_of(route, response.text, stream=stream)
        if has_result:
            assert (reply.text, reply.reasoning, reply.calls) == ("It is sunny.", "Good.", [])
        else:
            assert (reply.text, reply.reasoning, reply.calls) == ("", "Hm.", [("weather", '{"city": "Rome"}')])
        prompt = memoryview(server.engine.submitted[-1].prompt_token_ids).cast("i").tolist()
        assert tokenizer.decode(prompt, False) == HEAD + TURN * has_result + "<|start|>assistant"


def test_the_template_writes_one_call_a_message() -> None:
    uses = ChatTemplate(TEMPLATE).uses(has_tools=True)
    assert uses.has_one_call and uses.refuses_both and uses.arguments_format == "object"
