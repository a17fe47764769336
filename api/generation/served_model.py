"""A served model: its engine, tokenizer, chat template, limits, defaults and names."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from api.admission import MAX_TEXT_CHARS, Turns, check_number, pieces
from api.engine.channel import Channel
from api.engine.metrics import EngineMetrics
from api.engine.pool import Engines
from api.engine.queue_bound import NOBODY, Tenant
from api.engine.request_state import OutputOptions, RequestState, Siblings
from api.engine.submission import Submission
from api.errors import ContextLengthError, RequestError
from api.generation.host import INLINE_STEPS, INLINE_TEXT, Host
from api.generation.resolved import ResolvedRequest
from api.media.fetch import MediaAccess
from api.media.model_images import MAX_IMAGES, ModelImages
from api.model.chat_template import ChatTemplate
from api.model.files import ModelFiles
from api.model.late_interaction import LatePrompt, Side
from api.model.pooler import merge_pooler
from api.model.similarity import SIMILARITIES, Similarity
from api.model.tokenizer import Tokenizer
from api.params.defaults import default_params
from api.params.pooling import (
    PoolingParams,
    PoolingTask,
    check_prompt_length,
    resolve_task,
    rows_of_steps,
    without_special,
)
from api.params.sampling import ModelLimits, SamplingParams, child_seed, resolve_max_tokens, resolve_shared_params
from api.params.structured import StructuredOutputsParams, grammar_spec
from api.params.thinking import PromptEnd, after_thought, thinking_budget
from api.text.detokenizer import IncrementalDetokenizer
from api.version import VERSION
from engine_core.launch import get_logger
from engine_core.messages import (
    EngineReady,
    GrammarSpec,
    LoRARequest,
    MultiModalFeature,
    ResolvedParams,
    ResolvedPoolingParams,
)

T = TypeVar("T")

logger = get_logger()

MAX_SIBLINGS = 256
"""Maximum completions of a prompt per message, which takes some milliseconds here and in the engine core."""
SUBMIT_COST = 128
"""Cost of submitting a request, in token ids checked."""
NO_IMAGES: Mapping[int, tuple[MultiModalFeature, ...]] = {}
_NO_TEXT = OutputOptions(detokenize=False)


def _fingerprint(model_name: str, ready: EngineReady) -> str:
    """A fingerprint that changes when the answer to the same request may change."""
    backend = (
        model_name,
        ready.architecture,
        ready.dtype,
        ready.kv_cache_dtype,
        ready.device,
        ready.vocab_size,
        ready.max_model_len,
    )
    return f"octavo-{VERSION}-{hashlib.sha256(repr(backend).encode()).hexdigest()[:8]}"


class ServedModel:
    """A model whose engine is ready, with everything that requests need."""

    adapter: LoRARequest | None = None
    """The adapter that requests are computed with."""
    parent: str | None = None
    """With an adapter, the name of the model without."""

    def __init__(
        self, host: Host, files: ModelFiles, client: Engines, metrics: EngineMetrics, ready: EngineReady
    ) -> None:
        config = host.config
        self.host = host
        self.config = config
        self.client = client
        self.metrics = metrics
        self.ready = ready
        self.tokenizer: Tokenizer = files.tokenizer
        self.root = files.root
        """The model as given on the command line: a path or a hub id."""
        self.names = list(config.served_model_name) or [files.name]
        self.created = int(time.time())
        self.system_fingerprint = _fingerprint(self.name, ready)
        template = files.chat_template
        self.chat_template = (
            None if template is None else ChatTemplate(template, files.tokenizer.special_tokens_map, is_bounded=True)
        )
        self.defaults: dict[str, Any] = default_params(files.generation_config)
        self.limits = ModelLimits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            max_logprobs=config.max_logprobs,
            max_output_tokens=self.defaults.pop("max_new_tokens", None),
            # A tokenizer may have ids for which the model has no logits.
            eos_token_ids=tuple(token for token in files.tokenizer.eos_token_ids if token < ready.vocab_size),
            hidden_size=ready.hidden_size,
            pooling=ready.pooling,
        )
        ordinary = files.tokenizer.backend.get_vocab_size(with_added_tokens=False)
        if ordinary > ready.vocab_size:  # models may lack the ids of added tokens
            logger.warning(
                "the tokenizer has %d tokens, the model %d: they are of different models; texts with other tokens are "
                "rejected (--tokenizer chooses another)",
                ordinary,
                ready.vocab_size,
            )
        self.images: ModelImages | None = None
        """What the model does with images; None: it takes none."""
        if files.images is not None and ready.multimodal is not None:
            access = MediaAccess(tuple(config.allowed_media_domains), config.allowed_local_media_path)
            most = config.limit_mm_per_prompt.get("image", MAX_IMAGES)
            self.images = ModelImages(files.images, files.tokenizer, host.threads, access, most)
            host.helpers.append(self.images)
        self.pooler = merge_pooler(config.pooler_config, files.pooler)
        self.sentences = files.sentences
        self.tasks = files.tasks
        """Folders of adapters of tasks, which the checkpoint holds."""
        self.has_token_layers = bool(files.token_layers)
        """Whether layers of their own weigh tokens and make vectors of them (BGE-M3)."""
        self.pair_template = files.pair_template

    @property
    def name(self) -> str:
        """The name in responses, whichever of its names a request used."""
        return self.names[0]

    def with_adapter(self, adapter: LoRARequest, path: str) -> ServedModel:
        """The same model on the same engine, with an adapter whose name takes the place of the model's.

        Args:
            adapter: What requests are computed with.
            path: Where it is from, for the list of models.
        """
        view = copy.copy(self)
        view.adapter, view.parent, view.root = adapter, self.name, path
        view.names, view.created = [adapter.name], int(time.time())
        view.system_fingerprint = _fingerprint(f"{self.name} {adapter.content_hash}", self.ready)
        return view

    def rescaled(self, adapter: LoRARequest | None) -> ServedModel:
        """The same model under the same name with its adapter at another scale; None: without it."""
        view = copy.copy(self)
        view.adapter = adapter
        what = self.parent or self.name
        if adapter is not None:
            what += f" {adapter.content_hash}"
        view.system_fingerprint = _fingerprint(what, self.ready)
        return view

    def prompt_before(self, name: str | None) -> str:
        """The text that the model's files put before texts to embed.

        Args:
            name: Name of a prompt; empty: none. None: the files' default.

        Raises:
            RequestError: The files have no prompt of this name.
        """
        prompts = self.sentences.prompts
        name = self.sentences.default_prompt or "" if name is None else name
        if name and name not in prompts:
            known = f"choose from {', '.join(prompts)}" if prompts else "the model's files have none"
            raise RequestError(f"prompt_name {name!r} is unknown; {known}", "prompt_name")
        return prompts[name] if name else ""

    async def num_skipped(self, name: str | None) -> int:
        """Number of a prompt's tokens that are not pooled, as the model's files say. Raises the same error."""
        prompt = self.prompt_before(name)
        if self.sentences.pools_prompts or not prompt:
            return 0
        return len(await self.tokenize(prompt, add_special_tokens=True)) - self.tokenizer.added_around(True)[1]

    def pooling_params(self, task: PoolingTask, params: PoolingParams) -> ResolvedPoolingParams:
        """The engine's parameters of a task.

        Raises:
            RequestError: The model cannot do it, or a parameter is out of range.
        """
        if task == "embed" and self.sentences.late is not None:
            raise RequestError(
                "the model makes a vector of each token, and none of the text; use /score, /rerank, or /pooling with "
                "the task token_embed",
                "task",
            )
        if task == "embed" and params.dimensions is None:
            params = msgspec.structs.replace(params, dimensions=self.default_dimensions)
        return resolve_task(task, params, self.pooler, self.limits)

    @property
    def default_dimensions(self) -> int | None:
        """The length to which the model's files truncate vectors of texts; None: they do not."""
        dimensions = self.sentences.dimensions
        return dimensions if dimensions is None else min(dimensions, self.limits.hidden_size)

    @property
    def similarity(self) -> Similarity:
        """How two texts are compared: by their vectors, or those of their tokens."""
        late = self.sentences.late
        return SIMILARITIES[self.sentences.similarity] if late is None else late.score

    @property
    def usual_task(self) -> PoolingTask:
        """What /pooling does unless a request says it."""
        if self.sentences.late is not None:
            return "token_embed"
        own = self.limits.pooling.head_pooling
        if self.pooler.pooling_type == "STEP":
            return "token_classify" if own in ("ALL", "LAST") else "token_embed"
        return "embed" if not own or self.has_token_layers else "token_classify" if own == "ALL" else "classify"

    def counted_rows(self, rows: npt.NDArray[np.float32], prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """The results of those of a prompt's tokens that count.

        Args:
            rows: float32 [num_tokens, any].
            prompt: The token ids.
        """
        if self.has_token_layers:
            task: PoolingTask = "token_classify" if rows.shape[1] == 1 else "token_embed"
            return without_special(rows, prompt, self.tokenizer.all_special_ids, task)
        tag = self.pooler.step_tag_id
        return rows if tag is None else rows_of_steps(rows, prompt, tag)

    async def tokenize_late(
        self, text: str, *, is_query: bool, max_tokens: int = 0, side: Side = "right"
    ) -> LatePrompt:
        """The prompt of a text for late interaction.

        Args:
            text: A query or a document.
            is_query: Which of the two.
            max_tokens: Truncate it to this many tokens; 0: as the model's files say.
            side: Side on which tokens are removed.

        Raises:
            RequestError: It is too long judging by its number of characters, or not valid text.
        """
        late = self.sentences.late
        assert late is not None
        check_number(len(text), max(MAX_TEXT_CHARS, self.limits.max_model_len), "prompt", "characters")
        most = max_tokens or (late.query_length if is_query else late.document_length)
        most = min(most, self.limits.max_model_len)
        text = text.lower() if self.sentences.lowers else text
        encode = partial(late.query if is_query else late.document, self.tokenizer, text, most, side)
        return await self._tokenized(len(text), encode)

    async def _tokenized(self, length: int, encode: Callable[[], T]) -> T:
        """Tokenises here if there is little text, else in a thread."""
        try:
            if length <= INLINE_TEXT:
                await self.host.spend_turn(length)  # one request may have thousands of texts
                return encode()
            return await asyncio.get_running_loop().run_in_executor(self.host.threads, encode)
        except ValueError as error:
            raise RequestError(f"the prompt is not valid text: {error}", "prompt") from error

    async def tokenize(self, text: str, *, add_special_tokens: bool, any_length: bool = False) -> list[int]:
        """Token ids of a text that fits the model.

        Args:
            text: The text to tokenise.
            add_special_tokens: Add the special tokens that the tokenizer puts around a text.
            any_length: Accept a text that does not fit.

        Raises:
            RequestError: The text is too long judging by its number of characters, or is not valid text.
        """
        if self.images is not None:
            text = self.images.written(text)
        if any_length:
            check_number(len(text), max(MAX_TEXT_CHARS, self.limits.max_model_len), "prompt", "characters")
        per_token = None if any_length else self.tokenizer.max_chars_per_token
        if per_token is not None and len(text) > self.limits.max_model_len * per_token:
            raise ContextLengthError(
                f"This model's maximum context length is {self.limits.max_model_len} tokens. However, your prompt has "
                f"{len(text)} characters, which is more than fit in that many tokens. Please shorten the prompt.",
            )
        tokens = await self._tokenized(len(text), partial(self._encode, text, add_special_tokens))
        return tokens if self.images is None else self.images.filled_up(tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text.lower() if self.sentences.lowers else text, add_special_tokens)

    async def tokenize_pair(
        self,
        first: str,
        second: str,
        *,
        max_tokens: int = 0,
        max_first: int = 0,
        max_second: int = 0,
        instruction: str | None = None,
        prompt_name: str | None = None,
    ) -> tuple[list[int], int]:
        """Token ids of a query and a document; see ``Tokenizer.encode_pair``.

        Args:
            first: The query.
            second: The document.
            max_tokens: See there.
            max_first: See there.
            max_second: See there.
            instruction: What counts as relevant, if the model has a template.
            prompt_name: Of the text before the query, if it has none; see ``prompt_before``.

        Raises:
            RequestError: They are too long judging by their number of characters, or not valid text, or the files have
                no prompt of this name.
        """
        if self.pair_template is None:
            first = self.prompt_before(prompt_name) + first
        length = len(first) + len(second)
        check_number(length, max(MAX_TEXT_CHARS, self.limits.max_model_len), "prompt", "characters")
        if self.sentences.lowers:
            first, second = first.lower(), second.lower()
        encode = partial(self.tokenizer.encode_pair, first, second, max_tokens, max_second, max_first)
        if self.pair_template is not None:
            encode = partial(
                self.pair_template.encode,
                self.tokenizer,
                first,
                second,
                max_tokens,
                max_second,
                instruction,
                max_query=max_first,
            )
        return await self._tokenized(length, encode)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool, field: str) -> str:
        """The text of any number of token ids.

        Raises:
            RequestError: An id is outside the vocabulary.
        """

        def decode() -> str:
            self.check_token_ids(token_ids, field)
            if len(token_ids) <= INLINE_STEPS:
                return self.tokenizer.decode(token_ids, skip_special_tokens)
            # A single call of the backend would hold the GIL the whole time.
            detokenizer = IncrementalDetokenizer(self.tokenizer, (), skip_special_tokens)
            return detokenizer.extend(token_ids) + detokenizer.finish()

        return await self.host.apart(len(token_ids), decode)

    def special_ids(self, tokens: Iterable[str]) -> frozenset[int]:
        """Ids of those texts that are special tokens of the model."""
        ids = (self.tokenizer.token_to_id(token) for token in tokens)
        return frozenset(token_id for token_id in ids if token_id in self.tokenizer.all_special_ids)

    def check_token_ids(self, token_ids: Sequence[int], field: str = "prompt") -> None:
        """Checks that token ids are in the model's vocabulary.

        Raises:
            RequestError: An id is outside the vocabulary, or there are no ids.
        """
        if not token_ids:
            raise RequestError(f"{field} must not be empty", field)
        if min(token_ids) < 0 or max(token_ids) >= self.limits.vocab_size:
            raise RequestError(
                f"{field} contains a token id outside the vocabulary (0 to {self.limits.vocab_size - 1})", field
            )

    def check_priority(self, priority: int) -> None:
        """Rejects a priority that would have no effect.

        Raises:
            RequestError: The scheduling policy is not ``priority``.
        """
        if priority and self.config.engine.scheduler.scheduling_policy != "priority":
            raise RequestError("priority requires a server started with --scheduling-policy priority", "priority")

    def resolve(
        self,
        params: SamplingParams,
        *,
        grammar: GrammarSpec | None = None,
        when: StructuredOutputsParams | None = None,
        opened: bool | UnsetType | None = UNSET,
        priority: int = 0,
        cache_salt: str = "",
        kept_special_ids: frozenset[int] = frozenset(),
        tenant: Tenant = NOBODY,
        mm_features: tuple[MultiModalFeature, ...] = (),
    ) -> ResolvedRequest:
        """Resolves what all completions of a request share.

        Args:
            params: The requested parameters.
            grammar: The grammar of the outputs, if it does not come from ``params``.
            when: Parameters whose ``enable_in_reasoning`` applies; None: those in ``params``.
            opened: Whether the prompt of a conversation has begun or ended the reasoning; see
                ``prompt_opens_reasoning``. Unset: it is not a conversation, and its tokens decide.
            priority: Lower runs first.
            cache_salt: Requests share cached prompts only with those of the same salt.
            kept_special_ids: Special tokens that stay in the text even if ``skip_special_tokens`` is set.
            tenant: Whom the request is for.
            mm_features: Images of the prompt, of a request with one prompt.

        Raises:
            RequestError: A parameter is invalid for the model.
        """
        self.check_priority(priority)
        if grammar is None and params.structured_outputs is not None:
            grammar = grammar_spec(params.structured_outputs)
        if grammar is not None and self.config.structured_outputs_config.disable_any_whitespace:
            grammar = msgspec.structs.replace(grammar, disable_any_whitespace=True)
        options = OutputOptions(
            stop=tuple(params.stop_strings),
            stop_regex=tuple(params.stop_patterns),
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            kept_special_ids=kept_special_ids,
            detokenize=params.detokenize,
            min_tokens=params.min_tokens,
        )
        engine_params = resolve_shared_params(params, self.limits, self.tokenizer)
        return ResolvedRequest(
            params,
            engine_params,
            options,
            grammar,
            priority,
            cache_salt,
            tenant,
            opened,
            mm_features,
            self.holds_in_reasoning(when or params.structured_outputs),
        )

    def holds_in_reasoning(self, wanted: StructuredOutputsParams | None) -> bool:
        """Whether a grammar applies from the first token, instead of after the reasoning."""
        own = None if wanted is None else wanted.enable_in_reasoning
        return self.config.structured_outputs_config.enable_in_reasoning if own is None else own

    def _resolve_prompt(
        self, request: ResolvedRequest, prompt: Sequence[int]
    ) -> tuple[ResolvedParams, GrammarSpec | None]:
        """The parameters of a prompt's first completion (others differ in the seed), and the grammar of all."""
        self.check_token_ids(prompt)
        params = request.params
        resolved = msgspec.structs.replace(
            request.engine_params,
            seed=self.host.draw_seed() if params.seed is None else request.engine_params.seed,
            max_tokens=resolve_max_tokens(params, len(prompt), self.limits),
        )
        place = PromptEnd(self.config.reasoning_parser, self.tokenizer, self.limits.vocab_size, prompt, request.opened)
        num_tokens = params.thinking_token_budget
        grammar = request.grammar
        if grammar is not None:
            if not request.holds_in_reasoning:
                grammar = after_thought(grammar, num_tokens, place, resolved)
            return resolved, grammar
        if num_tokens is None:
            return resolved, None
        return msgspec.structs.replace(resolved, thinking_budget=thinking_budget(num_tokens, place, resolved)), None

    async def _resolve_prompts(
        self, request: ResolvedRequest, prompts: Sequence[Sequence[int]], turns: Turns
    ) -> list[tuple[ResolvedParams, GrammarSpec | None]]:
        resolved = []
        for prompt in prompts:
            resolved.append(self._resolve_prompt(request, prompt))
            await turns.spend(len(prompt))
        return resolved

    def _submission(self, request: ResolvedRequest, *, is_extra: bool, data_parallel_rank: int | None) -> Submission:
        """What a request asks of an engine, before its prompts are known."""
        return Submission(
            params=request.engine_params,
            options=request.options,
            priority=request.priority,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            is_extra=is_extra,
            mm_features=request.mm_features,
            lora_request=self.adapter,
            data_parallel_rank=data_parallel_rank,
        )

    async def submit(
        self,
        channel: Channel,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        request: ResolvedRequest,
        states: list[RequestState],
        *,
        first_choice: int = 0,
        data_parallel_rank: int | None = None,
    ) -> None:
        """Starts ``m = params.num_completions`` completions of each prompt.

        Completion ``i`` of prompt ``p`` is choice ``first_choice + p * m + i`` of the channel. Everything is validated
        before anything starts. With many completions, the work yields to other tasks.

        Args:
            channel: Receives the deltas.
            request_id: Id of the request in logs.
            prompts: Token ids.
            request: What the completions share.
            states: Started requests are appended; the caller aborts them if this fails or is cancelled halfway.
            first_choice: Number of the first completion.
            data_parallel_rank: The engine that must run them. None: the best one.

        Raises:
            RequestError: A prompt is invalid for the model, or too many requests are waiting.
            EngineDeadError: The engine died and is not restarted.
        """
        resolved = await self._resolve_prompts(request, prompts, turns := Turns())
        count = (num_children := request.params.num_completions) * len(prompts)
        is_extra = self.client.check_queue(request.tenant, count, num_children * sum(map(len, prompts)))
        common = self._submission(request, is_extra=is_extra, data_parallel_rank=data_parallel_rank)
        for place, (prompt, (engine_params, grammar)) in enumerate(zip(prompts, resolved, strict=True)):
            token_ids = np.asarray(prompt, np.int32).tobytes()
            submission = msgspec.structs.replace(common, params=engine_params, grammar=grammar)
            siblings = Siblings(num_children)
            for children in pieces(range(num_children), MAX_SIBLINGS):
                numbers = [place * num_children + child for child in children]
                started = self.client.submit_siblings(
                    channel,
                    first_choice + numbers[0],
                    submission,
                    request_ids=[f"{request_id}-{number}" if count > 1 else request_id for number in numbers],
                    prompt_token_ids=token_ids,
                    seeds=[child_seed(engine_params.seed, child) for child in children],
                )
                states += started
                metrics = self.metrics.of(started[0].engine)
                for child, state in zip(children, started, strict=True):
                    state.siblings = siblings
                    metrics.on_request(None if child else request.params.n, engine_params.max_tokens)
                await turns.spend(SUBMIT_COST * len(children) + len(prompt))

    async def _check_prompts(self, prompts: Sequence[Sequence[int]], field: str, turns: Turns) -> None:
        for prompt in prompts:
            self.check_token_ids(prompt, field)
            check_prompt_length(len(prompt), self.limits)
            await turns.spend(len(prompt))

    async def submit_pooling(
        self,
        channel: Channel,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: ResolvedPoolingParams | Sequence[ResolvedPoolingParams],
        states: list[RequestState],
        *,
        field: str = "input",
        priority: int = 0,
        cache_salt: str = "",
        first_choice: int = 0,
        tenant: Tenant = NOBODY,
        mm_features: Mapping[int, tuple[MultiModalFeature, ...]] = NO_IMAGES,
        data_parallel_rank: int | None = None,
    ) -> None:
        """Starts pooling requests: the vector of prompt ``p`` is choice ``first_choice + p``.

        Everything is validated before anything starts. With many prompts, the work yields to other tasks.

        Args:
            channel: Receives a delta when a request finishes.
            request_id: Id of the request in logs.
            prompts: Token ids.
            params: Parameters of all requests, or of each.
            states: As for ``submit``.
            field: The client's name of the prompts, for errors.
            priority, cache_salt: As for ``resolve``.
            first_choice: Number of the first request.
            tenant: Whom the requests are for.
            mm_features: Images of prompts, by number.
            data_parallel_rank: The engine that must run them. None: the best one for each.

        Raises:
            RequestError: A prompt is invalid for the model, or too many requests are waiting.
            EngineDeadError: The engine died and is not restarted.
        """
        self.check_priority(priority)
        turns = Turns()
        await self._check_prompts(prompts, field, turns)
        is_extra = self.client.check_queue(tenant, len(prompts), sum(map(len, prompts)))
        for number, prompt in enumerate(prompts):
            submission = Submission(
                params=params if isinstance(params, ResolvedPoolingParams) else params[number],
                options=_NO_TEXT,
                priority=priority,
                cache_salt=cache_salt,
                tenant=tenant,
                is_extra=is_extra,
                mm_features=mm_features.get(number, ()),
                lora_request=self.adapter,
                data_parallel_rank=data_parallel_rank,
            )
            name = f"{request_id}-{number}" if len(prompts) > 1 else request_id
            choice = first_choice + number
            states.append(self.client.submit(channel, choice, submission, request_id=name, prompt_token_ids=prompt))
            await turns.spend(SUBMIT_COST + len(prompt))
