"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from api.engine.channel import Delta
from api.errors import RequestError
from api.generation.generation import Generation
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.generation.usage import Usage
from api.http.body import read_json, work_on
from api.http.stream import (
    DONE,
    KEEP_ALIVE,
    MARK,
    TokenStream,
    WholeAnswer,
    around_choices,
    error_event,
    event,
    joined,
    split_at_mark,
)
from api.http.tenants import enter_queue
from api.model.tokenizer import AddedAround
from api.openai.beam import beam_search_params, create_generation
from api.openai.logprobs import CompletionColumns, TokenSpelling, prompt_logprobs, spells_ids
from api.openai.prompts import prompt_token_ids, prompt_token_offsets
from api.openai.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    TokenOffsets,
)
from api.openai.refusals import refuse_completion
from api.openai.sampling import (
    answer_id,
    check_positive,
    check_stream_fields,
    sampling_params,
    wants_usage,
)
from api.openai.structured import requested_grammar
from api.params.sampling import MAX_N

DECODER = msgspec.json.Decoder(CompletionRequest)
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024


async def create_completion(request: Request) -> Response:
    """Completes one or more texts."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DECODER, serving.config.max_body_size)
    model = await serving.choose_model(body.model, body)
    refuse_completion(body)
    check_stream_fields(body)
    prompts = list_prompts(body.prompt)
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt may contain at most {MAX_PROMPTS} prompts, got {len(prompts)}", "prompt")
    check_positive("best_of", body.best_of)
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise RequestError(
            "best_of greater than n does not support stream: the best are known only at the end", "best_of"
        )
    if len(prompts) * max(1, body.n or 1, body.best_of or 1) > MAX_N:
        name = "n" if body.best_of is None else "best_of"
        raise RequestError(f"the number of prompts times {name} must be at most {MAX_N}", name)
    count = len(prompts) * (1 if body.use_beam_search else max(1, body.n or 1, body.best_of or 1))
    tenant = enter_queue(request, model, body.safety_identifier or body.user, count)
    token_ids = [
        await prompt_token_ids(model, body, prompt, add_special_tokens=True, max_tokens=body.max_tokens)
        for prompt in prompts
    ]
    offsets = None
    if body.return_token_offsets:
        offsets = [
            await prompt_token_offsets(model, body, prompt, len(ids), add_special_tokens=True)
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]
    max_tokens = _max_tokens(model, body, max(map(len, token_ids)))
    grammar = await model.host.apart(work_on(request), requested_grammar, body)
    params = (
        beam_search_params(body, grammar, max_tokens=max_tokens, logprobs=body.logprobs)
        if body.use_beam_search
        else sampling_params(
            body,
            model.defaults,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=_num_prompt_logprobs(body),
            best_of=body.best_of,
        )
    )
    generation = create_generation(
        model, answer_id("cmpl", request, body.request_id), token_ids, params, body, grammar, tenant=tenant
    )
    echoes = await _echoes(model, body, prompts, token_ids)
    places = await _echo_offsets(model, body, prompts, token_ids)
    reply = CompletionReply(model, body, generation, echoes, params.n, offsets, places)
    if body.stream:
        return TokenStream(generation, reply, serving.config.sse_keep_alive_interval)
    return WholeAnswer(generation, reply)


def list_prompts(prompt: str | list[str | int | list[int]], field: str = "prompt") -> list[str | list[int]]:
    """The prompts of a request, from any of the four accepted forms.

    Raises:
        RequestError: The field is empty or mixes forms.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(f"{field} must not be empty", field)
    kinds = set(map(type, prompt))  # fast: there may be hundreds of thousands of token ids
    if len(kinds) > 1:
        raise RequestError(
            f"{field} must be a string, a list of strings, a list of token ids or a list of lists of token ids", field
        )
    return [cast("list[int]", prompt)] if int in kinds else cast("list[str | list[int]]", prompt)


def _max_tokens(model: ServedModel, request: CompletionRequest, num_prompt_tokens: int) -> int:
    """The engine's token limit. The engine generates at least one token; if ``max_tokens`` is 0, it is dropped."""
    if request.max_tokens is None:
        return max(1, min(DEFAULT_MAX_TOKENS, model.limits.max_model_len - num_prompt_tokens))
    return 1 if _is_echo_only(request) else request.max_tokens


def _is_echo_only(request: CompletionRequest) -> bool:
    return bool(request.echo) and request.max_tokens == 0


def _num_prompt_logprobs(request: CompletionRequest) -> int | None:
    counts = [
        count for count in (request.prompt_logprobs, request.logprobs if request.echo else None) if count is not None
    ]
    return -1 if -1 in counts else max(counts, default=None)


async def _echoes(
    model: ServedModel, request: CompletionRequest, prompts: Sequence[str | list[int]], token_ids: Sequence[list[int]]
) -> list[str]:
    """The texts of the prompts, which completions start with if ``echo`` is set."""
    if not request.echo:
        return [""] * len(prompts)
    echoes = []
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
            echoes.append(prompt)
            continue
        before, after = _added_around(model, request, prompt)
        own = ids[before : len(ids) - after]  # the text's own tokens; added ones are not echoed
        echoes.append(await model.detokenize(own, skip_special_tokens=False, field="prompt") if own else "")
    return echoes


def _added_around(model: ServedModel, request: CompletionRequest, prompt: str | list[int]) -> AddedAround:
    adds = isinstance(prompt, str) and request.add_special_tokens is not False
    return model.tokenizer.added_around(adds)


async def _echo_offsets(
    model: ServedModel, request: CompletionRequest, prompts: Sequence[str | list[int]], token_ids: Sequence[list[int]]
) -> list[list[int] | None]:
    """Start of each token in an echoed text; None for prompts that are echoed from their tokens."""
    result: list[list[int] | None] = [None] * len(prompts)
    if not request.echo or request.logprobs is None:
        return result
    is_cut = request.truncate_prompt_tokens is not None
    for index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)):
        if isinstance(prompt, str):
            offsets = await prompt_token_offsets(model, request, prompt, len(ids), add_special_tokens=True)
            start = min((begin for begin, end in offsets if end), default=0) if is_cut else 0
            own = [(begin - start, end - start) if end else (0, 0) for begin, end in offsets]
            result[index] = _beginnings(own, len(prompt))
    return result


def _beginnings(offsets: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Starts of tokens; an added token, whose offset is (0, 0), starts where the previous one ended."""
    beginnings = []
    end = 0
    for begin, token_end in offsets:
        beginnings.append(min(begin if token_end else end, length))
        end = max(end, token_end)
    return beginnings


class CompletionReply:
    """The outputs of completions, as chunks or one whole answer."""

    keep_alive = KEEP_ALIVE
    error_event = staticmethod(error_event)

    def __init__(
        self,
        model: ServedModel,
        request: CompletionRequest,
        generation: Generation,
        echoes: list[str],
        n: int,
        offsets: Sequence[TokenOffsets] | None,
        echo_offsets: Sequence[list[int] | None],
    ) -> None:
        self._generation = generation
        self._offsets = offsets
        self._echo_offsets = echo_offsets
        self._echoes = echoes
        self._n = n
        self._has_echo = bool(request.echo)
        self._is_echo_only = _is_echo_only(request)
        self._has_logprobs = request.logprobs is not None or bool(request.logprob_token_ids)
        self._has_prompt_logprobs = request.prompt_logprobs is not None
        self._has_token_ids = bool(request.return_token_ids)
        self._ends_with_usage, self._has_usage = wants_usage(request, always=model.config.enable_force_include_usage)
        self._is_plain = not (self._has_logprobs or self._has_token_ids or self._has_usage or self._is_echo_only)
        as_ids = spells_ids(model.config, request)
        self._spelling = TokenSpelling(model.tokenizer, as_ids=as_ids, broken_prefix="bytes:")
        self._skipped_ids = (
            frozenset[int]() if request.skip_special_tokens is False else model.tokenizer.all_special_ids
        )
        self._num_output_tokens = 0
        self._columns: dict[int, CompletionColumns] = {}
        self._folds: dict[int, _Fold] = {}
        """By choice, for a whole answer."""
        self._constants: dict[int, tuple[bytes, bytes]] = {}
        """For each started choice, the JSON before and after the text of a plain chunk."""
        self._chunk = CompletionResponse(
            id=generation.request_id,
            created=int(time.time()),
            model=model.name,
            choices=[],
            system_fingerprint=model.system_fingerprint,
            usage=None if self._ends_with_usage else UNSET,
        )
        self._encoder = msgspec.json.Encoder()

    # -- both forms ------------------------------------------------------------------------------------------

    def _first_pieces(self, delta: Delta) -> list[CompletionChoice]:
        prompt_index = delta.choice // self._n
        prompt = self._generation.prompts[prompt_index]
        if self._has_logprobs:
            columns = self._columns[delta.choice] = CompletionColumns(self._spelling, self._skipped_ids)
        pieces = []
        if self._has_echo:
            echo = CompletionChoice(index=delta.choice, text=self._echoes[prompt_index])
            if self._has_logprobs:
                echo.logprobs = columns.prompt(
                    prompt, echo.text, delta.prompt_logprobs, self._echo_offsets[prompt_index]
                )
            if self._has_token_ids:
                echo.token_ids = []
            pieces.append(echo)
        pieces.append(self._piece(delta))
        if self._has_token_ids:
            pieces[0].prompt_token_ids = list(prompt)
        if self._offsets is not None:
            pieces[0].prompt_token_offsets = self._offsets[prompt_index]
        if self._has_prompt_logprobs:
            pieces[0].prompt_logprobs = prompt_logprobs(len(prompt), delta.prompt_logprobs, self._spelling)
        return pieces

    def _piece(self, delta: Delta) -> CompletionChoice:
        piece = CompletionChoice(
            index=delta.choice, text=delta.text, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
        )
        tokens, entries = delta.token_ids, delta.logprobs
        if self._is_echo_only:
            tokens, entries, piece.text = (), (), ""
            if delta.finish_reason is not None:
                piece.finish_reason, piece.stop_reason = "length", None
        self._num_output_tokens += len(tokens)
        if self._has_logprobs:
            piece.logprobs = self._columns[delta.choice].output(tokens, entries)
        if self._has_token_ids:
            piece.token_ids = list(tokens)
        return piece

    # -- a stream --------------------------------------------------------------------------------------------

    def event(self, delta: Delta) -> bytes:
        constants = self._constants.get(delta.choice)
        if constants is None:
            marked = CompletionChoice(index=delta.choice, text=MARK)
            self._constants[delta.choice] = split_at_mark(self._encode(marked))
            return b"".join(map(self._encode, self._first_pieces(delta)))
        if self._is_plain and delta.finish_reason is None:
            return constants[0] + self._encoder.encode(delta.text) + constants[1]
        return self._encode(self._piece(delta))

    def _encode(self, piece: CompletionChoice) -> bytes:
        return event(self._encode_chunk(piece))

    def _encode_chunk(self, piece: CompletionChoice) -> bytes:
        chunk = self._chunk
        chunk.choices = [piece]
        if self._has_usage:
            chunk.usage = self._generation.usage(self._num_output_tokens)
        return self._encoder.encode(chunk)

    def last_event(self) -> bytes:
        if not self._ends_with_usage:
            return DONE
        self._chunk.choices = []
        self._chunk.usage = self._usage()
        return event(self._encoder.encode(self._chunk)) + DONE

    def _usage(self) -> Usage:
        return self._generation.usage(0 if self._is_echo_only else None)

    # -- one answer ------------------------------------------------------------------------------------------

    def fold(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            fold = self._folds.get(delta.choice)
            if fold is None:
                fold = self._folds[delta.choice] = _Fold(delta.choice)
                for piece in self._first_pieces(delta):
                    fold.add(piece)
            else:
                fold.add(self._piece(delta))

    def whole(self) -> Iterator[bytes]:
        self._chunk.usage = self._usage()
        before, after = around_choices(self._encoder.encode(self._chunk))
        yield before
        for number, index in enumerate(sorted(self._folds)):
            self._columns.pop(index, None)
            yield (b"," if number else b"") + self._encoder.encode(self._folds.pop(index).choice())
        yield after


class _Fold:
    """Accumulates the pieces of one choice."""

    def __init__(self, index: int) -> None:
        self._whole = CompletionChoice(
            index=index, text="", token_ids=None, prompt_token_ids=None, prompt_logprobs=None
        )
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._columns: list[list[bytes]] | None = None
        """Encoded pieces of the log probability columns, instead of thousands of objects."""

    def add(self, piece: CompletionChoice) -> None:
        whole = self._whole
        self._texts.append(piece.text)
        whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
        if piece.prompt_token_ids is not UNSET:
            whole.prompt_token_ids = piece.prompt_token_ids
        if piece.prompt_token_offsets is not UNSET:
            whole.prompt_token_offsets = piece.prompt_token_offsets
        if piece.prompt_logprobs is not UNSET:
            whole.prompt_logprobs = piece.prompt_logprobs
        if isinstance(piece.token_ids, list):
            self._token_ids += piece.token_ids
            whole.token_ids = self._token_ids
        if piece.logprobs is not None:
            if self._columns is None:
                self._columns = [[] for _ in CompletionLogprobs.__struct_fields__]
            for column, more in zip(self._columns, msgspec.structs.astuple(piece.logprobs), strict=True):
                column.append(msgspec.json.encode(more)[1:-1])

    def choice(self) -> CompletionChoice:
        self._whole.text = "".join(self._texts)
        if self._columns is not None:
            columns: list[Any] = [joined(column) for column in self._columns]
            self._whole.logprobs = CompletionLogprobs(
                **dict(zip(CompletionLogprobs.__struct_fields__, columns, strict=True))
            )
        return self._whole
