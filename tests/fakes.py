"""Stand-ins for what is slow or needs files: an engine with a script, a tokenizer, a client that leaves."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers
from starlette.applications import Starlette
from starlette.types import Message
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from api.config import ServerConfig, make_config
from api.engine.calls import Answer
from api.engine.channel import Channel, PacedChannel
from api.engine.client import EngineClient
from api.engine.metrics import EngineMetrics
from api.engine.output import OutputProcessor
from api.engine.place import no_such_rank
from api.engine.queue_bound import QueueBound, Tenant, queue_full
from api.engine.request_state import RequestState
from api.engine.sleeper import Sleeper
from api.engine.submission import Submission
from api.errors import EngineDeadError
from api.generation.adapters import Adapters
from api.generation.host import Host
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.http.traffic import Traffic
from api.model.files import ModelFiles, with_parsers
from api.model.tokenizer import Tokenizer
from api.server.app import create_app
from engine_core.config import SchedulerConfig
from engine_core.messages import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineReady,
    EnsureAdapter,
    FinishReason,
    ForgetAdapter,
    PoolingSupport,
    ResolvedParams,
    ResolvedPoolingParams,
    SchedulerStats,
    TokenLogprobs,
    i32,
    to_tensor,
)

BOS, EOS, IM_START, IM_END = 0, 1, 2, 3
FIRST_BYTE = 4
"""Id of the token that spells byte 0; the other bytes follow."""
MERGED = ("th", "he", "ll", "the")
"""Tokens of more than one byte."""
VOCAB_SIZE = FIRST_BYTE + 256 + len(MERGED)
MAX_MODEL_LEN = 512
HIDDEN_SIZE = 16
MODEL = "fake-model"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Script = Callable[[list[int], ResolvedParams], Iterable[int]]


def token_of(byte: int) -> int:
    """Id of the token that spells one byte."""
    return FIRST_BYTE + byte


def tokens_of(text: str) -> list[int]:
    """One token for each byte."""
    return [token_of(byte) for byte in text.encode()]


def tiny_tokenizer(*added: str) -> Tokenizer:
    """Byte-level, with four special tokens and perhaps more that are not special; puts a start token before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = byte_spelling()
    assert set(alphabet) == set(spelling)
    vocab = {"<s>": BOS, "</s>": EOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    vocab |= {char: FIRST_BYTE + byte for byte, char in enumerate(spelling)}
    vocab |= {token: FIRST_BYTE + 256 + i for i, token in enumerate(MERGED)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("h", "e"), ("l", "l"), ("th", "e")]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in list(vocab)[:4]])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(
        backend,
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=[EOS, IM_END],
        chat_template=CHAT_TEMPLATE,
    )


def byte_spelling() -> list[str]:
    """How GPT-2 spells each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def echo_script(prompt: list[int], params: ResolvedParams) -> Iterable[int]:
    """The prompt without its special tokens, over and over."""
    body = [token for token in prompt if token >= FIRST_BYTE] or [token_of(ord("."))]
    while True:
        yield from body


def says(text: str, end: int | None = EOS) -> Script:
    """A script that says one thing, then the end token, if it has one."""

    def script(prompt: list[int], params: ResolvedParams) -> Iterable[int]:
        yield from tokens_of(text)
        while end is not None:
            yield end
        yield from echo_script(prompt, params)

    return script


class _Row:
    def __init__(self, state: RequestState, tokens: Iterable[int], num_tokens: int) -> None:
        self.state = state
        self.tokens = iter(tokens)
        self.num_tokens = num_tokens


class FakeEngineClient:
    """What ``ServedModel`` needs of an ``EngineClient``, without processes.

    A step gives each request a token of its script, or several; it takes one turn of the event loop. Everything that
    the engine core decides is decided as it would: stop tokens, lengths, log probabilities. Text is made by the real
    ``OutputProcessor``.
    """

    def __init__(self, tokenizer: Tokenizer, metrics: EngineMetrics, script: Script = echo_script) -> None:
        self.tokenizer = tokenizer
        self.dead: EngineDeadError | None = None
        self.sleeper = Sleeper(self.call, metrics.on_sleep)
        self.script = script
        self.submitted: list[EngineCoreRequest] = []
        """Every request there ever was."""
        self.aborted: list[int] = []
        self.forgotten: list[str] = []
        """Hashes of adapters that nobody needs any more."""
        """Indices of the requests that the consumer dropped."""
        self.likely: Callable[[list[int]], dict[int, float]] | None = None
        """The log probabilities of the tokens that may follow others; None: see ``fake_logprobs``."""
        self.is_restarting = False
        self.max_queued: int | None = None
        """Requests that may be unfinished."""
        self.checked: list[tuple[Tenant, int]] = []
        """What asked for room in the queue: who, and for how many requests."""
        self.num_cached_tokens = 0
        self.num_labels = 0
        self.tokens_per_step = 1
        """Tokens that a step gives each request."""
        self.refusal: tuple[str, str] | None = None
        """Message and field with which every request ends at its first step."""
        self.steps_left: int | None = None
        """None: no bound. Requests wait at 0."""
        self._processor = OutputProcessor(metrics, QueueBound(SchedulerConfig()))
        self._rows: dict[int, _Row] = {}
        self._stepper: asyncio.Task[None] | None = None
        self._next_index = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._processor.states)

    @property
    def is_ready(self) -> bool:
        return self.dead is None and not self.is_restarting

    def check_queue(self, tenant: Tenant, count: int = 1, num_tokens: int = 0) -> bool:
        if self.dead is not None:
            raise self.dead
        self.checked.append((tenant, count))
        if self.max_queued is not None and self.num_unfinished + count > self.max_queued:
            raise queue_full(7)
        return False

    def check_key(self, key: str) -> None:
        pass

    def open_channel(self, stream_interval: int = 1) -> Channel:
        loop = asyncio.get_running_loop()
        return Channel(loop) if stream_interval == 1 else PacedChannel(loop, stream_interval)

    def submit(
        self,
        channel: Channel,
        choice: int,
        submission: Submission,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
        seed: int | None = None,
    ) -> RequestState:
        if submission.data_parallel_rank:
            raise no_such_rank(submission.data_parallel_rank, (0,))
        if self.dead is not None:
            raise self.dead
        self._next_index += 1
        message = submission.request(
            request_id,
            self._next_index,
            np.asarray(prompt_token_ids, np.int32).tobytes(),
            seed=seed,
            output_token_ids=np.asarray(output_token_ids, np.int32).tobytes(),
        )
        self.submitted.append(message)
        state = RequestState(message, submission.options, self.tokenizer, channel, choice)
        self._processor.add(state)
        tokens: Iterable[int] = ()
        if message.sampling_params is not None:
            tokens = self.script([*prompt_token_ids, *output_token_ids], message.sampling_params)
        self._rows[state.index] = _Row(state, tokens, len(output_token_ids))
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.create_task(self._run())
        return state

    def submit_siblings(
        self,
        channel: Channel,
        first_choice: int,
        submission: Submission,
        *,
        request_ids: Sequence[str],
        prompt_token_ids: bytes,
        seeds: Sequence[int],
    ) -> list[RequestState]:
        prompt = i32(prompt_token_ids).tolist()
        return [
            self.submit(
                channel, first_choice + number, submission, request_id=request_id, prompt_token_ids=prompt, seed=seed
            )
            for number, (request_id, seed) in enumerate(zip(request_ids, seeds, strict=True))
        ]

    async def call(self, make: Callable[[int], object]) -> Answer:
        """Adapters fit if their name is not ``unfit``; other calls do nothing."""
        message = make(1)
        if not isinstance(message, EnsureAdapter):
            return {}
        return {"error": "it does not fit" if message.adapter.name == "unfit" else ""}

    def tell(self, message: ForgetAdapter) -> None:
        self.forgotten.append(message.content_hash)

    def abort(self, states: Iterable[RequestState]) -> None:
        for state in states:
            if self._processor.abort(state):
                self.aborted.append(state.index)
                self._rows.pop(state.index, None)

    def fail(self, message: str) -> None:
        """All requests go wrong, as with bad logits."""
        for state in list(self._processor.states.values()):
            self._processor.fail(state, message)
        self._rows.clear()

    def fail_one(self, message: str) -> None:
        """One request goes wrong."""
        index, state = next(iter(self._processor.states.items()))
        self._processor.fail(state, message)
        del self._rows[index]

    def fail_all(self, message: str) -> None:
        self.dead = EngineDeadError(message)
        self.fail(message)

    async def _run(self) -> None:
        while self._rows:
            await asyncio.sleep(0)
            if self.steps_left is not None:
                if self.steps_left <= 0:
                    await asyncio.sleep(0.001)
                    continue
                self.steps_left -= 1
            self._step()

    def _step(self) -> None:
        plain: list[tuple[int, int, list[int]]] = []
        special: list[EngineCoreOutput] = []
        for index, row in list(self._rows.items()):
            if row.state.message.pooling_params is not None:
                special.append(self._pooled(row.state.message, row.state.message.pooling_params))
                del self._rows[index]
                continue
            first = row.num_tokens
            tokens: list[int] = []
            told: list[EngineCoreOutput] = []
            for token in islice(row.tokens, self.tokens_per_step):
                tokens.append(token)
                output = self._output(row, token)
                row.num_tokens += 1
                if output is None:
                    continue
                told.append(output)
                if output.finish_reason is not None:
                    del self._rows[index]
                    break
            if told:
                logprobs = tuple(entry for output in told for entry in output.new_logprobs)
                whole = (
                    told[-1]
                    if len(told) == 1
                    else msgspec.structs.replace(
                        told[-1],
                        prompt_logprobs=told[0].prompt_logprobs,
                        num_cached_tokens=told[0].num_cached_tokens,
                        scheduled_time=told[0].scheduled_time,
                    )
                )
                if whole.error is None:
                    whole = msgspec.structs.replace(
                        whole, first_output_index=first, new_token_ids=tuple(tokens), new_logprobs=logprobs
                    )
                special.append(whole)
            else:
                plain.append((index, first, tokens))
        outputs = EngineCoreOutputs(
            engine_epoch=1,
            indices=array("q", [index for index, _, _ in plain]).tobytes(),
            output_indices=array("i", [number for _, number, _ in plain]).tobytes(),
            token_ids=array("i", [token for _, _, tokens in plain for token in tokens]).tobytes(),
            num_tokens=b"" if self.tokens_per_step == 1 else bytes(len(tokens) for _, _, tokens in plain),
            outputs=tuple(special),
            scheduler_stats=SchedulerStats(num_scheduled_tokens=len(self._rows)),
            timestamp=time.monotonic(),
        )
        for index in self._processor.process(outputs):
            self._rows.pop(index, None)

    def _pooled(self, message: EngineCoreRequest, params: ResolvedPoolingParams) -> EngineCoreOutput:
        prompt = i32(message.prompt_token_ids).tolist()
        if params.pooling_type == "ALL" and not params.classifies:
            vector = np.stack([fake_vector([token]) for token in prompt])[:, : params.dimensions]
        else:
            vector = fake_vector(prompt)[: params.dimensions]
        if params.classifies:
            vector = vector[: self.num_labels] + params.second_segment
        if params.normalize:
            vector /= np.linalg.norm(vector, axis=-1, keepdims=True)
        return EngineCoreOutput(
            index=message.index,
            first_output_index=0,
            finish_reason=FinishReason.STOP,
            pooling_output=to_tensor(vector),
            num_cached_tokens=self.num_cached_tokens,
            scheduled_time=time.monotonic(),
        )

    def _output(self, row: _Row, token: int) -> EngineCoreOutput | None:
        """What a token has to say beside itself, if anything."""
        if self.refusal is not None:
            message, param = self.refusal
            return EngineCoreOutput(
                index=row.state.index,
                first_output_index=row.num_tokens,
                finish_reason=FinishReason.ERROR,
                error=message,
                error_param=param,
            )
        params = row.state.message.sampling_params
        assert params is not None
        number = row.num_tokens
        stopped = token in params.all_stop_token_ids and number + 1 >= params.min_tokens
        full = number + 1 >= params.max_tokens
        if number and not stopped and not full and params.logprobs is None:
            return None
        prompt = i32(row.state.message.prompt_token_ids).tolist()
        prompt_logprobs = []
        if params.prompt_logprobs is not None and number == 0:
            prompt_logprobs = [
                fake_logprobs(prompt[position], position, params.prompt_logprobs) for position in range(1, len(prompt))
            ]
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH if full else None
        return EngineCoreOutput(
            index=row.state.index,
            first_output_index=number,
            new_token_ids=(token,),
            finish_reason=reason,
            stop_reason=token if stopped and token in params.stop_token_ids else None,
            ends_with_stop_token=stopped,
            new_logprobs=() if params.logprobs is None else (self._logprobs(row, token, params),),
            prompt_logprobs=tuple(prompt_logprobs),
            num_cached_tokens=self.num_cached_tokens if number == 0 else None,
            scheduled_time=time.monotonic() if number == 0 else None,
        )

    def _logprobs(self, row: _Row, token: int, params: ResolvedParams) -> TokenLogprobs:
        assert params.logprobs is not None
        if self.likely is None:
            return fake_logprobs(token, 0, params.logprobs, params.logprob_token_ids)
        message = row.state.message
        before = i32(message.prompt_token_ids).tolist() + i32(message.resumed_output_token_ids).tolist()
        table = {token: -1000.0 - token for token in range(VOCAB_SIZE)} | self.likely(before)
        ranked = sorted(table.items(), key=lambda item: -item[1])
        best = ranked[: None if params.logprobs < 0 else params.logprobs]
        return TokenLogprobs(
            row=0,
            position=0,
            token_ids=array("i", [ranked[0][0], *(token for token, _ in best)]).tobytes(),
            logprobs=array("f", [ranked[0][1], *(logprob for _, logprob in best)]).tobytes(),
            rank=1,
        )


def fake_vector(prompt: Sequence[int]) -> npt.NDArray[np.float32]:
    """How often each of the lower letters a to p stands in a prompt, plus a little that is the same for all."""
    counts = [prompt.count(token_of(ord("a") + i)) for i in range(HIDDEN_SIZE)]
    vector: npt.NDArray[np.float32] = np.array(counts, np.float32) + np.float32(0.125)
    return vector


def fake_logprobs(token: int, position: int, count: int, wanted: Sequence[int] = ()) -> TokenLogprobs:
    """The token itself with -1, the next ids in the vocabulary with -2, -3 and so on."""
    others = list(wanted) or [(token + 1 + i) % VOCAB_SIZE for i in range(VOCAB_SIZE if count < 0 else count)]
    return TokenLogprobs(
        row=0,
        position=position,
        token_ids=array("i", [token, *others]).tobytes(),
        logprobs=array("f", [-1.0 - i for i in range(1 + len(others))]).tobytes(),
        rank=1,
    )


def config_with_all_routes(**options: Any) -> ServerConfig:
    """The configuration of a server that offers everything."""
    adapters = {"enable_lora": True, "allowed_lora_path": "/adapters", "admin_api_key": ["admin-key"]}
    return make_config({"enable_tokenizer_info_endpoint": True, **adapters, **options})[0]


class FakeServer:
    """The application over a fake engine."""

    def __init__(
        self,
        config: ServerConfig | None = None,
        script: Script = echo_script,
        generation_config: dict[str, Any] | None = None,
        chat_template: str | None = CHAT_TEMPLATE,
        tokenizer: Tokenizer | None = None,
        vocab_size: int = VOCAB_SIZE,
        pooling: PoolingSupport | None = None,
        **files_fields: Any,
    ) -> None:
        tokenizer = tokenizer or tiny_tokenizer()
        self.metrics = EngineMetrics(MODEL)
        self.engine = FakeEngineClient(tokenizer, self.metrics, script)
        files = ModelFiles(
            name=MODEL,
            path=Path("fake"),
            root="/models/fake",
            gguf=None,
            read_tokenizer=lambda: tokenizer,
            chat_template=chat_template,
            generation_config=generation_config or {},
            generation_config_file=Path("fake/generation_config.json"),
            **files_fields,
        )
        ready = EngineReady(
            engine_epoch=1,
            pid=1,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=vocab_size,
            num_kv_blocks=8,
            block_size=32,
            max_num_seqs=8,
            hidden_size=HIDDEN_SIZE,
            pooling=pooling or PoolingSupport(),
        )
        self.engine.num_labels = len(ready.pooling.labels)
        client = cast(EngineClient, self.engine)
        host = Host(with_parsers(config or ServerConfig(), chat_template))
        self.model = ServedModel(host, files, client, self.metrics, ready)
        has_adapters = host.config.engine.executor.lora.enable_lora
        self.serving = Serving(host, [self.model], Adapters(self.model) if has_adapters else None)
        self.traffic = Traffic(self.metrics.registry)
        self.app: Starlette = create_app(self.serving, self.traffic)


class Connection:
    """One HTTP request at the level of ASGI, by a client that may leave at any time."""

    def __init__(
        self,
        app: Starlette,
        path: str,
        body: Any,
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        method: str = "POST",
        is_complete: bool = True,
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": not is_complete})
        self.sent: list[Message] = []
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.send: Callable[[Message], Awaitable[None]] = self._keep
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Message) -> None:
        await self.send(message)

    async def _keep(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})
