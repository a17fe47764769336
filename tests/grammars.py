"""Structured outputs without a model: random schemas, and an engine core over a simulated device."""

from __future__ import annotations

import random
import select
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from api.params.structured import vocabulary_frame
from engine_core.config import (
    CacheConfig,
    EngineConfig,
    ExecutorConfig,
    SchedulerConfig,
    SimulatedDevice,
    SpeculativeConfig,
)
from engine_core.core import EngineCore
from engine_core.messages import (
    I32,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineReady,
    FromEngineCore,
    GrammarSpec,
    ResolvedParams,
    SetVocabulary,
    ToEngineCore,
    i32,
    i64,
    u8,
)
from executor.messages import GrammarMask, ModelRunnerOutput, SchedulerOutput
from executor.simulated import DeviceModel, SimulatedExecutor
from tests.fakes import EOS, VOCAB_SIZE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY = msgspec.msgpack.decode(vocabulary_frame(TOKENIZER), type=SetVocabulary)
MAX_LEN = 600
PATTERNS = ["^[a-z]+@[a-z]+\\.com$", "^[0-9]{3}-[0-9]{2,4}$", "^(foo|ba[rz])+$", "^[^x]{2,5}x$", "^\\S+ \\S+$", "b"]


@dataclass
class Drafts:
    """What a device proposes."""

    count: int
    outputs: dict[int, list[int]]
    """By seed."""
    wrong_every: int = 0
    """One in so many is wrong; 0: none."""
    num_accepted: int = 0


class DraftingModel(DeviceModel):
    """A device that verifies drafts."""

    def __init__(self, device: SimulatedDevice, drafts: Drafts) -> None:
        super().__init__(device)
        self._drafts = drafts
        self._num_prompt: dict[int, int] = {}
        self._proposed: dict[int, list[int]] = {}
        self._known: dict[int, list[int]] = {}
        """Tokens by slot."""

    def execute(self, plan: SchedulerOutput) -> tuple[I32, float]:
        for request in plan.new_reqs:
            self._num_prompt[request.slot] = request.num_prompt_tokens
            self._proposed[request.slot] = []
            self._known[request.slot] = i32(request.token_ids).tolist()
        return super().execute(plan)

    def result(self, plan: SchedulerOutput, tokens: I32, mask: GrammarMask | None, seconds: float) -> ModelRunnerOutput:
        masks: dict[int, list[I32]] = {}
        if mask is not None:
            constrained = i32(plan.grammar_slots).tolist()
            counts = list(mask.num_positions) or [1] * len(constrained)
            rows = iter(i32(mask.bitmask).reshape(sum(counts), -1))
            masks = {slot: list(islice(rows, count)) for slot, count in zip(constrained, counts, strict=True)}
        for forced in plan.forced_drafts:
            drafts = forced.after(np.array(self._known[forced.slot], np.int32)).tolist()
            self._proposed[forced.slot] = drafts or self._proposed[forced.slot]
        allowances = plan.num_draft_tokens or bytes(len(plan.num_sampled))
        columns = (i32(plan.slots).tolist(), plan.num_sampled, allowances)
        slots = [(slot, allowed) for slot, wanted, allowed in zip(*columns, strict=True) if wanted]
        sampled = [self._sample(slot, allowed, masks.get(slot)) for slot, allowed in slots]
        self._drafts.num_accepted += sum(len(row) - 1 for row in sampled)
        proposed = [self._proposed[slot] for slot, _ in slots]
        return ModelRunnerOutput(
            step_id=plan.step_id,
            sampled_token_ids=np.array(sum(sampled, []), np.int32).tobytes(),
            num_accepted=bytes(len(row) - 1 for row in sampled),
            num_draft_tokens=bytes(len(row) for row in proposed),
            draft_token_ids=np.array(sum(proposed, []), np.int32).tobytes(),
        )

    def _sample(self, slot: int, allowed: int, masks: list[I32] | None) -> list[int]:
        length = int(self._num_computed[slot])
        sampled: list[int] = []
        for place, draft in enumerate([*self._proposed[slot][:allowed], -1]):
            token = int(self.tokens(np.array([slot], np.int32), np.array([length + place]))[0])
            if masks is not None and place < len(masks):
                token = self.choose(token, masks[place])
            sampled.append(token)
            if token != draft:
                break
        self._num_computed[slot] = length + len(sampled) - 1
        self._known[slot] += sampled
        first = length + len(sampled) - self._num_prompt[slot]
        output = self._drafts.outputs.get(int(self._seeds[slot]), [])[first : first + self._drafts.count]
        every = self._drafts.wrong_every
        self._proposed[slot] = [
            token - 1 if every and (first + place) % every == 0 else token for place, token in enumerate(output)
        ]
        return sampled


class Engine:
    """An engine core whose device takes any allowed token, chosen by seed and position."""

    def __init__(
        self, *, depth: int = 2, max_num_seqs: int = 16, num_blocks: int = 2000, drafts: Drafts | None = None
    ) -> None:
        config = EngineConfig(
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=512, max_in_flight_steps=depth),
            cache=CacheConfig(num_gpu_blocks_override=num_blocks),
            executor=ExecutorConfig(
                check_every_step=True,
                speculative=SpeculativeConfig(method="scripted", num_speculative_tokens=drafts.count)
                if drafts
                else None,
                distributed_executor_backend="simulated",
                simulated_device=SimulatedDevice(
                    step_us=0,
                    token_us=0,
                    context_us=0,
                    vocab_size=VOCAB_SIZE,
                    block_size=16,
                    num_blocks=num_blocks,
                    max_model_len=MAX_LEN,
                ),
            ),
        )
        self.executor = SimulatedExecutor(config.executor, "")
        if drafts is not None:
            self.executor.new_model = lambda device: DraftingModel(device, drafts)
        self.inbox: list[ToEngineCore] = [VOCABULARY]
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, int] = {}
        self.errors: dict[int, tuple[str | None, str | None]] = {}
        """By request: message and field."""
        self.num_open = 0
        self.is_ready = False
        self.core = EngineCore(config, self.executor, self, engine_epoch=1)
        self.executor.start()

    # -- the transport

    def send(self, message: FromEngineCore) -> None:
        if isinstance(message, EngineReady):
            self.is_ready = True
        if not isinstance(message, EngineCoreOutputs):
            return
        tokens = iter(i32(message.token_ids).tolist())
        indices, positions = i64(message.indices).tolist(), i32(message.output_indices).tolist()
        counts = u8(message.num_tokens).tolist() or [1] * len(indices)
        for index, position, count in zip(indices, positions, counts, strict=True):
            self._append(index, position, list(islice(tokens, count)))
        for output in message.outputs:
            self._append(output.index, output.first_output_index, list(output.new_token_ids))
            if output.finish_reason is not None:
                self.reasons[output.index] = output.finish_reason
                self.errors[output.index] = (output.error, output.error_param)
                self.num_open -= 1

    def _append(self, index: int, position: int, tokens: list[int]) -> None:
        assert index not in self.reasons, "nothing comes after the end"
        known = self.tokens.setdefault(index, [-1] * position)
        assert position == len(known), "no gap and no overlap"
        known += tokens

    def wait(self, fds: Sequence[Any], timeout: float | None) -> list[ToEngineCore] | None:
        if self.inbox:
            timeout = 0
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        assert poller.poll(10_000 if timeout is None else timeout * 1000) or timeout is not None, "nothing happens"
        messages, self.inbox = self.inbox, []
        return messages

    # -- what tests do

    def add(
        self,
        index: int,
        grammar: GrammarSpec | None,
        max_tokens: int = 64,
        *,
        prompt: Sequence[int] = (10, 11, 12),
        resumed: Sequence[int] = (),
        **params: Any,
    ) -> None:
        params = {"eos_token_ids": (EOS,), "seed": index, "max_tokens": max_tokens, **params}
        self.num_open += 1
        self.inbox.append(
            EngineCoreRequest(
                request_id=str(index),
                index=index,
                prompt_token_ids=np.array(prompt, np.int32).tobytes(),
                sampling_params=ResolvedParams(**params),
                resumed_output_token_ids=np.array(resumed, np.int32).tobytes(),
                grammar=grammar,
            )
        )

    def run(self) -> None:
        """Until every request has ended."""
        while self.num_open:
            self.core.step()
        scheduler = self.core._scheduler
        assert scheduler is not None and not scheduler.has_unfinished and not scheduler.pool.compiling
        scheduler.check_integrity()

    def text(self, index: int) -> bytes:
        """What a request generated, without its end token."""
        return text_of(self.tokens[index])

    def close(self) -> None:
        self.core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def text_of(tokens: Sequence[int]) -> bytes:
    """The text of an output, without its end token."""
    return b"".join(VOCABULARY.tokens[token] for token in tokens if token != EOS)


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A JSON schema of what is supported, nested up to ``depth`` objects and arrays."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    if depth > 0:
        kinds += ["object", "object", "object", "array", "array", "anyOf", "union", "tree"]
    kind = rng.choice(kinds)
    schema: dict[str, Any] = {}
    if kind == "enum":
        return {
            "enum": rng.sample(["red", "green", 1, 2.5, None, True, [1, 2], {"a": 1}, 'é"\\', ""], rng.randint(1, 5))
        }
    if kind == "const":
        return {"const": rng.choice(["x" * 12, 17, {"k": [1, None]}, False])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "union":
        return {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"type": {"const": name}, "value": random_schema(rng, depth - 1)},
                    "required": ["type", "value"],
                    "additionalProperties": False,
                }
                for name in ("cat", "dog", "category")[: rng.randint(1, 3)]
            ]
        }
    if kind == "tree":
        if depth < 3:  # references are resolved from the root
            return {"type": "array", "items": {"type": "boolean"}}
        properties = {"value": random_schema(rng, 0), "children": {"type": "array", "items": {"$ref": "#/$defs/n"}}}
        required = rng.choice([["value"], ["value", "children"]])
        node = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        return {"$defs": {"n": node}, "$ref": "#/$defs/n"}
    schema["type"] = kind
    if kind == "string":
        choice = rng.randrange(6)
        if choice == 0:
            schema["minLength"] = rng.randint(0, 12)
            if rng.random() < 0.5:
                schema["maxLength"] = schema["minLength"] + rng.randint(0, 9)
        elif choice == 1:
            schema["pattern"] = rng.choice(PATTERNS)
        elif choice == 2:
            schema["format"] = rng.choice(["date", "time", "date-time", "uuid", "ipv4", "email"])
    elif kind == "integer" or kind == "number":
        if rng.random() < 0.5:
            schema["minimum"] = rng.randint(-50, 200)
        if rng.random() < 0.5:
            schema["maximum"] = schema.get("minimum", 0) + rng.randint(0, 1000)
        if kind == "integer" and rng.random() < 0.2:
            schema = {"type": kind, "multipleOf": rng.choice([2, 7, 10])}
    elif kind == "array":
        schema["items"] = random_schema(rng, depth - 1)
        if rng.random() < 0.4:
            schema["minItems"] = rng.randint(0, 4)
        if rng.random() < 0.4:
            schema["maxItems"] = schema.get("minItems", 0) + rng.randint(0, 3)
        if rng.random() < 0.2:
            schema["prefixItems"] = [random_schema(rng, 0) for _ in range(2)]
    elif kind == "object":
        names = rng.sample(["a", "name", "long_property_name", "x-y", "ünï", "type", "ab", "abc"], rng.randint(0, 4))
        schema["properties"] = {name: random_schema(rng, depth - 1) for name in names}
        schema["required"] = [name for name in names if rng.random() < 0.6]
        if rng.random() < 0.7:
            schema["additionalProperties"] = rng.choice([False, random_schema(rng, 0)])
    return schema
