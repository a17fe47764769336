"""Steps that bring several tokens of a request: text, usage and journal are those of one token at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.config import ServerConfig
from api.engine.channel import Delta
from api.engine.metrics import EngineMetrics
from api.engine.output import OutputProcessor
from api.engine.queue_bound import QueueBound
from api.engine.request_state import OutputOptions, RequestState
from engine_core.config import SchedulerConfig
from engine_core.messages import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason, SchedulerStats
from tests.fakes import MODEL, fake_logprobs, tiny_tokenizer, token_of, tokens_of
from tests.scripted import EOS, ScriptedModel
from tests.unit.conftest import Api


class Collected:
    """A channel that keeps all there is."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def push(self, delta: Delta) -> None:
        self.deltas.append(delta)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


class Reader:
    """An output processor and one request."""

    def __init__(self, **options: Any) -> None:
        self.processor = OutputProcessor(EngineMetrics(MODEL), QueueBound(SchedulerConfig()))
        self.channel = Collected()
        message = EngineCoreRequest(request_id="a", index=7, prompt_token_ids=b"\x04\0\0\0")
        self.state = RequestState(message, OutputOptions(**options), tiny_tokenizer(), self.channel, 0)  # type: ignore[arg-type]
        self.state.first_token_time = 1.0
        self.processor.add(self.state)

    def columns(self, place: int, tokens: list[int], timestamp: float = 2.0, drafts: int = 0) -> list[int]:
        return self.processor.process(
            EngineCoreOutputs(
                engine_epoch=1,
                indices=(7).to_bytes(8, "little"),
                output_indices=place.to_bytes(4, "little"),
                token_ids=b"".join(token.to_bytes(4, "little") for token in tokens),
                num_tokens=bytes([len(tokens)]),
                num_draft_tokens=bytes([drafts]) if drafts else b"",
                num_accepted_tokens=bytes([len(tokens) - 1]) if drafts else b"",
                timestamp=timestamp,
            )
        )

    def output(self, **fields: Any) -> list[int]:
        output = EngineCoreOutput(index=7, **fields)
        return self.processor.process(EngineCoreOutputs(engine_epoch=1, outputs=(output,), timestamp=2.0))


def test_a_row_is_one_delta() -> None:
    reader = Reader()
    assert reader.columns(0, tokens_of("hel")) == [] and reader.columns(3, tokens_of("lo")) == []
    assert [delta.text for delta in reader.channel.deltas] == ["hel", "lo"]
    assert reader.channel.tokens == reader.state.output_token_ids.tolist() == tokens_of("hello")


def test_tokens_that_come_twice_are_dropped_one_by_one() -> None:
    """A new engine core may repeat some of what the one before had said, in other rows."""
    reader = Reader()
    reader.columns(0, tokens_of("hel"))
    reader.columns(1, tokens_of("ello"))
    reader.columns(2, tokens_of("ll"))
    assert reader.channel.text == "hello"
    assert reader.state.output_token_ids.tolist() == tokens_of("hello")


def test_a_gap_ends_the_request() -> None:
    reader = Reader()
    reader.columns(0, tokens_of("he"))
    assert reader.columns(3, tokens_of("lo")) == [7]
    assert reader.channel.deltas[-1].error == "tokens 2 to 2 of the output were lost"


@pytest.mark.parametrize("finish", [None, FinishReason.LENGTH])
def test_nothing_counts_behind_a_stop_string(finish: FinishReason | None) -> None:
    reader = Reader(stop=("ST",), include_stop_str_in_output=False)
    logprobs = tuple(fake_logprobs(token, 0, 0) for token in tokens_of("aSTbc"))
    aborts = reader.output(
        first_output_index=0, new_token_ids=tuple(tokens_of("aSTbc")), new_logprobs=logprobs, finish_reason=finish
    )
    assert aborts == ([7] if finish is None else [])
    (delta,) = reader.channel.deltas
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", "ST")
    assert list(delta.token_ids) == reader.state.output_token_ids.tolist() == tokens_of("aST")
    assert delta.logprobs == logprobs[:3]


def test_a_stop_string_in_a_row_of_the_columns_ends_it_there() -> None:
    reader = Reader(stop=("lo",), include_stop_str_in_output=True, min_tokens=3)
    assert reader.columns(0, tokens_of("lohel")) == []
    assert reader.columns(5, tokens_of("lo wor")) == [7]
    assert reader.channel.text == "lohello"
    assert reader.state.output_token_ids.tolist() == tokens_of("lohello")


def test_latencies_are_shared_by_the_tokens_of_a_row() -> None:
    reader = Reader()
    reader.state.last_token_time = 1.0
    reader.columns(0, tokens_of("abcd"), timestamp=2.0)
    steps = reader.processor._metrics._steps
    assert (int(steps.latency_counts.sum()), steps.latency_sum) == (4, 1.0)


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_logprobs_and_token_ids_are_those_of_single_tokens(route: str, stream: bool) -> None:
    model = ScriptedModel()
    marker = model.says("count", "one", " two", " three", " four", " five", EOS)
    found = []
    for tokens_per_step in (1, 2, 4):
        api = Api(model.fake(ServerConfig(), tokens_per_step=tokens_per_step))
        body: dict[str, Any] = {"stop": [" thr"], "max_tokens": 9, "return_token_ids": True}
        if route == "chat":
            body |= {"messages": [{"role": "user", "content": marker}], "logprobs": True, "top_logprobs": 1}
        else:
            body |= {"prompt": marker, "logprobs": 1}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
        response = await api.post(path, body)
        text = response.text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [
            json.loads(text)
        ]
        tokens: list[int] = []
        entries: list[Any] = []
        usage: Any = None
        for event in events:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                tokens += choice.get("token_ids") or []
                part = choice.get("logprobs") or {}
                entries += part.get("content") or part.get("token_logprobs") or []
        found.append((tokens, entries, usage))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == len(found[0][1]) == found[0][2]["completion_tokens"] == 3


def test_every_token_is_there() -> None:
    """Bytes of a character that come in one row or in two."""
    for cut in range(1, 4):
        reader = Reader()
        tokens = [token_of(byte) for byte in "a🙂".encode()]
        reader.columns(0, tokens[:cut])
        reader.columns(cut, tokens[cut:])
        assert reader.channel.text == "a🙂"


def test_drafts_are_counted_in_usage_and_metrics() -> None:
    reader = Reader()
    reader.columns(0, tokens_of("hel"), drafts=4)
    reader.columns(3, tokens_of("l"), drafts=1)
    reader.output(first_output_index=4, new_token_ids=tuple(tokens_of("o!")), num_draft_tokens=1, num_accepted_tokens=1)
    assert (reader.state.num_draft_tokens, reader.state.num_accepted_tokens) == (6, 3)
    metrics = EngineMetrics(MODEL)
    stats = SchedulerStats(num_drafts=2, num_draft_tokens=6, num_accepted_tokens=3, num_accepted_tokens_per_pos=(2, 1))
    assert b"spec_decode" not in metrics.render()
    metrics.on_step(stats, 0, [])
    metrics.on_restart("engine_core", 1)
    metrics.on_step(stats, 0, [])
    text = metrics.render().decode()
    labels = f'engine="0",model_name="{MODEL}"'
    for line in (
        f"vllm:spec_decode_num_drafts_total{{{labels}}} 4.0",
        f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} 12.0",
        f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} 6.0",
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}} 2.0',
    ):
        assert line in text
