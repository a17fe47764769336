"""Drafts that the device makes and verifies before the host knows how many of the last ones were accepted."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

import ops
from engine_core.grammars import Grammars
from engine_core.messages import EngineCoreRequest, GrammarSpec
from engine_core.request import Request
from executor.config import ModelConfig, SpeculativeConfig
from executor.messages import ResolvedParams, SchedulerOutput
from executor.model_runner import ModelRunner
from executor.request_states import RequestStates
from executor.sampling import draft_sampler
from executor.sampling.base import SampleRows
from executor.sampling.reference import ReferenceSampler
from tests import tiny
from tests.fakes import EOS
from tests.grammars import VOCABULARY
from tests.models.harness import random_tokens
from tests.models.test_draft_heads import MTP, eagle_head, mtp_model
from tests.models.test_late_device import MAX_LEN, THINKING, Engine, ReferenceCpu, answers

fake_cuda = pytest.importorskip("tests.fake_cuda", reason="Triton is not installed")

from executor.sampling.device import DeviceSampler  # noqa: E402

PROPOSERS = ["itself", "another", "short", "eagle3", "mtp"]
"""Models that are mostly right, nearly never, and nothing beyond some length; and heads."""
PLAIN: list[tuple[list[int], ResolvedParams]] = [
    (random_tokens(40, 1), ResolvedParams(temperature=0.0, max_tokens=18)),
    (random_tokens(7, 2), ResolvedParams(seed=2, top_p=0.9, top_k=40, logprobs=3, max_tokens=12)),
    (random_tokens(60, 3), ResolvedParams(seed=3, temperature=1.2, max_tokens=9, num_speculative_tokens=1)),
    (random_tokens(33, 4), ResolvedParams(seed=4, min_p=0.05, prompt_logprobs=2, logprobs=-1, max_tokens=6)),
    (random_tokens(1, 5), ResolvedParams(temperature=0.0, max_tokens=20, stop_token_ids=tuple(range(7)))),
    (random_tokens(50, 7), ResolvedParams(seed=7, logit_bias=((9, 4.0), (11, -3.0)), max_tokens=12)),
    (random_tokens(40, 1), ResolvedParams(temperature=0.0, max_tokens=10, num_speculative_tokens=0)),
    (random_tokens(3, 9), ResolvedParams(seed=9, allowed_token_ids=tuple(range(40, 90)), max_tokens=16)),
]
"""Requests whose tokens the device samples without hearing from the host."""


@pytest.fixture
def fake() -> Iterator[Any]:
    before = ops.op_set("cpu")
    device = fake_cuda.FakeCuda(by_itself=False, kernels="reference")
    yield device
    device.close()
    ops.use("cpu", before)


@pytest.fixture
def late_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The drafts of steps that began before it was known how many of the last ones were accepted."""
    found: list[int] = []
    begin = ModelRunner.begin

    def noted(self: ModelRunner, plan: Any) -> Any:
        is_open = self.states.num_verifying.copy()
        step = begin(self, plan)
        open_slots = is_open[step.computed.slots] > 0
        if open_slots.any() and step.drafts is not None:
            found.append(int((step.drafts >= 0).sum()))
        return step

    monkeypatch.setattr(ModelRunner, "begin", noted)
    return found


def proposer(name: str, folder: Path, setup: dict[str, Any]) -> SpeculativeConfig:
    if name == "eagle3":
        return eagle_head(folder / "head")[0]
    if name == "mtp":
        setup["folder"] = folder / "model"
        mtp_model(setup["folder"], "glm4_moe")
        return MTP
    fields: dict[str, Any] = {"rope_theta": 3.0, "hidden_act": "gelu"} if name == "another" else {}
    model = ModelConfig(
        model=str(tiny.checkpoint("llama", **fields)),
        dtype="float32",
        max_model_len=24 if name == "short" else MAX_LEN,
    )
    return SpeculativeConfig(
        method="draft_model", num_speculative_tokens=3, draft=model, min_token_prob=0.0, is_adaptive=False
    )


def engine_of(
    fake: Any, monkeypatch: pytest.MonkeyPatch, speculative: SpeculativeConfig | None, setup: dict[str, Any]
) -> Engine:
    engine = Engine(fake, monkeypatch, speculative=speculative, **setup)
    draft = engine.worker.runner.draft
    if draft is not None and draft.has_head:
        fake_cuda.put_on_device(draft.loaded.model)
    return engine


def plain_answers(engine: Engine) -> tuple[dict[int, Any], ...]:
    for index, (prompt, params) in enumerate(PLAIN):
        engine.add(index, prompt, params)
    engine.run()
    engine.scheduler.check_integrity()
    states = engine.worker.runner.states
    assert not states.num_verifying.any()
    return engine.outputs, engine.logprobs


CROWDED: dict[str, Any] = {"num_blocks": 5, "max_num_batched_tokens": 24}
CASES: list[tuple[str, dict[str, Any]]] = [("itself", {"max_in_flight_steps": 3})]


@pytest.mark.parametrize(("name", "setup"), [*CASES, *((name, CROWDED) for name in PROPOSERS)], ids=str)
def test_nothing_waits_and_nothing_changes(
    name: str,
    setup: dict[str, Any],
    fake: Any,
    late_steps: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = dict(setup)
    speculative = proposer(name, tmp_path, setup)
    outputs, logprobs = plain_answers(Engine(ReferenceCpu(), monkeypatch, **setup))
    engine = engine_of(fake, monkeypatch, speculative, setup)
    assert engine.worker.runner.late is not None
    found = plain_answers(engine)
    assert found[0] == outputs
    assert found[1].keys() == logprobs.keys()
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in setup)
    assert engine.scheduler.drafts.num_draft_tokens > 30
    assert fake.channel.num_in_flight == 0
    assert sum(late_steps) > 20
    if name in ("itself", "short"):
        assert engine.num_accepted > 10
    if name == "another":
        assert engine.num_accepted < 0.3 * engine.scheduler.drafts.num_draft_tokens


@pytest.mark.parametrize("kernels", [False, True])
def test_drafts_are_drawn_with_the_numbers_of_the_request(
    kernels: bool, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels:
        monkeypatch.setattr(draft_sampler, "new_backend", lambda _, *rest: DeviceSampler(*rest))
    config = replace(proposer("itself", tmp_path, {}), draft_sample_method="probabilistic")
    engine = engine_of(fake, monkeypatch, config, {"max_num_batched_tokens": 24})
    params = ResolvedParams(max_tokens=14)
    for index, fields in enumerate(({}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.0})):
        engine.add(index, random_tokens(11 * index + 1, index), replace(params, seed=index, **fields))
    engine.run()
    # Steps that were planned before the end of an output was known verify drafts that nothing follows.
    assert engine.num_accepted > 0.75 * engine.scheduler.drafts.num_draft_tokens > 20


@pytest.mark.parametrize("name", ["itself", "eagle3"])
def test_requests_for_which_the_host_must_know_the_tokens(
    name: str, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = {**CROWDED, "num_blocks": 7}
    speculative = proposer(name, tmp_path, setup)
    expected = answers(Engine(ReferenceCpu(), monkeypatch, **setup))
    engine = engine_of(fake, monkeypatch, speculative, setup)
    outputs, logprobs, vectors = answers(engine)
    assert outputs == expected[0]
    assert logprobs.keys() == expected[1].keys() and vectors.keys() == expected[2].keys()
    assert engine.scheduler.num_preemptions > 0 and engine.scheduler.drafts.num_draft_tokens > 0


class ConstrainedEngine(Engine):
    """An engine whose requests may have grammars."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self._grammars = Grammars(None)
        self._grammars.set_vocabulary(VOCABULARY)
        self._grammars.set_vocab_size(tiny.VOCAB_SIZE)

    def constrain(self, index: int, prompt: list[int], params: ResolvedParams, spec: GrammarSpec) -> None:
        """Adds a request with a grammar."""
        message = EngineCoreRequest(str(index), index, np.array(prompt, np.int32).tobytes(), params, grammar=spec)
        request = Request(message)
        self._grammars.start(request, params.max_tokens)
        compiler = self._grammars.compiler
        assert compiler is not None
        while not (compiled := self._grammars.take()):
            assert select.select([compiler.fileno()], [], [], 60)[0], "not compiled"
        assert compiled[0].problem is None
        self.outputs[index] = []
        self.scheduler.add_request(request)

    def launch(self) -> bool:
        is_launched = super().launch()
        if is_launched and len(self.in_flight) == 1:
            self._mask()
        return is_launched

    def retire(self) -> None:
        super().retire()
        self._mask()

    def _mask(self) -> None:
        """Sends the mask of the oldest step, whose earlier tokens are known."""
        if self.in_flight and len(self.in_flight[0].grammar_rows):
            mask, ended = self._grammars.mask(self.scheduler.table, self.in_flight[0])
            assert not ended
            self.worker.handle(mask)

    def run(self) -> None:
        super().run()
        self._grammars.close()


HOST_KNOWS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "bad words": {"bad_words_token_ids": ((5,), (6, 7))},
    "thinking budget": {"thinking_budget": THINKING},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": tuple(range(60))},
    "grammar": {},
}
"""What depends on tokens, or on how many there are."""


@pytest.mark.parametrize("kind", HOST_KNOWS)
def test_rows_that_depend_on_tokens_wait_for_them_and_others_go_on(
    kind: str, fake: Any, late_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: set[int] = set()
    num_drafts: list[int] = []
    begin = ModelRunner.begin

    def checked(self: ModelRunner, plan: SchedulerOutput) -> Any:
        slots.update(request.slot for request in plan.new_reqs if request.num_prompt_tokens == 21)
        is_open = self.states.num_verifying.copy()
        is_known = self.states.num_known == self.states.num_tokens
        step = begin(self, plan)
        rows = step.rows
        if step.drafts is not None:
            own = np.isin(rows.slots, [*slots])
            assert not is_open[rows.slots[own]].any() and is_known[rows.slots[own]].all()
            num_drafts.append(int((step.drafts[own] >= 0).sum()))
        return step

    def run(engine: ConstrainedEngine) -> dict[int, list[int]]:
        params = ResolvedParams(temperature=0.0, max_tokens=24, **HOST_KNOWS[kind])
        for index in range(2):
            prompt = random_tokens(21, index)
            if kind == "grammar":
                params = msgspec.structs.replace(params, temperature=1.0, seed=index, eos_token_ids=(EOS,))
                engine.constrain(index, prompt, params, GrammarSpec(kind="regex", text="([a-f]{2}-){3,}"))
            else:
                engine.add(index, prompt, params)
        for index in range(2, 4):
            engine.add(index, random_tokens(20, index), ResolvedParams(temperature=0.0, max_tokens=100))
        engine.run()
        return engine.outputs

    expected = run(ConstrainedEngine(ReferenceCpu(), monkeypatch))
    speculative = proposer("itself", Path(), {})
    engine = ConstrainedEngine(fake, monkeypatch, speculative=speculative)
    assert engine.worker.runner.late is not None
    monkeypatch.setattr(ModelRunner, "begin", checked)
    assert run(engine) == expected
    assert sum(num_drafts) > 10, "they have drafts, too"
    assert sum(late_steps) > 20


def test_a_restart_changes_nothing(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speculative = proposer("itself", Path(), {})
    expected = plain_answers(Engine(ReferenceCpu(), monkeypatch))[0]
    engine = engine_of(fake, monkeypatch, speculative, {})
    for index, (prompt, params) in enumerate(PLAIN):
        engine.add(index, prompt, params)
    for _ in range(8):
        while engine.launch():
            pass
        engine.retire()
    before = {index: list(tokens) for index, tokens in engine.outputs.items()}
    assert any(before.values()) and engine.in_flight
    again = engine_of(fake, monkeypatch, speculative, {})
    for index, (prompt, params) in enumerate(PLAIN):
        if len(before[index]) < len(expected[index]):
            again.add(index, prompt, params, resumed=before[index])
    again.run()
    assert {index: tokens + again.outputs.get(index, []) for index, tokens in before.items()} == expected


def test_the_device_goes_on_where_the_accepted_drafts_end(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that drafts for itself is right, as if the host had waited."""
    speculative = proposer("itself", Path(), {})
    engine = engine_of(fake, monkeypatch, speculative, {})
    engine.add(0, random_tokens(20, 1), ResolvedParams(temperature=0.0, max_tokens=41))
    engine.run()
    drafts = engine.scheduler.drafts
    assert drafts.num_draft_tokens - drafts.num_accepted_tokens <= 3, "but for those behind the end"


def test_lengths_follow_what_is_accepted(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for name in ("itself", "another"):
        speculative = proposer(name, Path(), {})
        fields = {each: getattr(speculative, each) for each in ("method", "num_speculative_tokens", "draft")}
        engine = engine_of(fake, monkeypatch, SpeculativeConfig(**fields), {})
        late = engine.worker.runner.late
        assert late is not None
        monkeypatch.setattr(late, "_share", 0.3)
        late._lengths.costs.add(1, 5.0)  # the fake device tells no times
        engine.add(0, random_tokens(20, 1), ResolvedParams(temperature=0.0, max_tokens=40))
        engine.run()
        counts.append(engine.scheduler.drafts.num_draft_tokens)
    assert 0 < counts[1] < 2 * counts[0]


@pytest.mark.parametrize("backend", [ReferenceSampler, DeviceSampler])
def test_random_numbers_are_those_of_the_device_s_positions(backend: type[ReferenceSampler | DeviceSampler]) -> None:
    sampler, states = backend(2), RequestStates(2, 64, [])
    states.num_prompt[:] = states.num_known[:] = 7
    for slot in range(2):
        sampler.add(slot, ResolvedParams(seed=slot, temperature=1.0))
    slots, places = np.array([0, 0, 1], np.int32), np.array([9, 10, 7])
    found = []
    for excess in (None, 0, 2):
        rows = SampleRows(slots, places + (excess or 0), np.array([0, 0, 1], np.int32), np.array([0, 1, 0]))
        if excess is not None:
            rows.device_positions = torch.from_numpy(places)
        logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
        found.append(sampler.sample(logits, logits, rows, states, None).token_ids.tolist())
    assert found[0] == found[1] == found[2]
