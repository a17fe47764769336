"""Offline inference: the engine behind a blocking class."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import msgspec
from tqdm import tqdm

from api.config import ServerConfig, from_environment, make_config
from api.engine.metrics import EngineMetrics
from api.engine.pool import create_engines
from api.engine.progress import LoadBar, SpeedMeter
from api.engine.request_state import RequestState
from api.engine.request_stats import request_stats
from api.engine.thread import EngineThread
from api.errors import EngineDeadError, RequestError
from api.flags import ConfigError
from api.generation.adapters import Adapters
from api.generation.beam_search import Beam, BeamSearch, BeamSearchError, BeamSearchParams, gather
from api.generation.host import Host
from api.generation.served_model import ServedModel
from api.llm_inputs import (
    Input,
    LoRARequests,
    Messages,
    Prompt,
    adapters_of,
    as_list,
    conversations_of,
    inputs_of,
    parse_prompt,
)
from api.llm_options import LLMOptions
from api.llm_outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Folder,
    Logprob,
    RequestOutput,
    describe_position,
    keep_best,
)
from api.llm_pooling import PoolingRunner
from api.media.offline import place_offline, take_offline, without_images
from api.model.files import ModelFiles, find_model, with_model
from api.model.tokenizer import NOTHING_ADDED, Tokenizer
from api.params.defaults import check_defaults
from api.params.lora import LoRARequest
from api.params.pooling import (
    POOLING_TASKS,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    PoolingTask,
    RerankOutput,
    ScoringRequestOutput,
)
from api.params.sampling import SamplingParams
from api.params.thinking import conversation_opens_reasoning
from api.params.truncation import output_room, truncate_prompt
from api.ray_machines import with_machines
from engine_core.launch import get_logger, setup_logging
from engine_core.messages import EngineReady

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class LLM:
    """A model for offline inference. It runs in the same engine processes as the server.

    Example:
        >>> llm = LLM(model="Qwen/Qwen3-0.6B")
        >>> llm.generate("Hello, my name is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str = "", **options: Unpack[LLMOptions]) -> None:
        """Starts the engine and loads the model.

        Args:
            model: Hub id, folder or GGUF file. Default: the demo model.
            **options: The server's flags with underscores, such as ``max_model_len=4096``; vLLM's names work.

        Raises:
            ValueError: An option is unknown or out of range.
            ModelFileError: The model's files are missing or damaged.
            EngineDeadError: The engine cannot be started.
        """
        try:
            values = {"log_level": "warning", **from_environment(os.environ), **options, "model": model}
            config, notes = make_config(values)
            if config.engine.executor.parallel.node_rank:
                raise ConfigError("node_rank: only machine 0 runs programs; octavo serve --node-rank runs the others")
            if config.headless:
                raise ConfigError("headless: octavo serve --headless runs the engines of other machines")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        setup_logging("api", config.log_level, config.log_format)
        if notes:
            get_logger().warning("options that have no effect: %s", "; ".join(notes))
        files = find_model(config)
        check_defaults(files)
        machines = ExitStack()
        self._config = with_model(machines.enter_context(with_machines(config)), files)
        self._ids = count()
        self._engine = EngineThread()
        # Runs when this object is collected, or when the interpreter exits.
        self._finalizer = weakref.finalize(self, _end, self._engine, machines)
        try:
            self._model = self._run(_start(self._engine, self._config, files))
        except BaseException:
            self.close()
            raise
        self._adapters = Adapters(self._model)
        self._pooling = PoolingRunner(self._model, self._adapters, self._ids)
        weakref.finalize(self, self._model.host.close)

    def __repr__(self) -> str:
        model = self._model
        ready = model.ready
        state = "" if self._finalizer.alive else ", closed"
        return (
            f"LLM(model={model.name!r}, dtype={ready.dtype!r}, device={ready.device!r}, "
            f"max_model_len={ready.max_model_len}{state})"
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._engine.run(work)

    def close(self) -> None:
        """Stops the engine. Also called when the object is collected, when the interpreter exits, and by ``with``."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sleep(self, level: int = 1, *, keep_kv: bool = False) -> None:
        """Frees memory until ``wake_up``; until then, requests raise ``RequestError``.

        Args:
            level: 1 frees the KV cache. 2 frees the weights, too, by ending the workers.
            keep_kv: Keep the KV cache.

        Raises:
            ValueError: Another level.
        """
        if level not in (1, 2):
            raise ValueError(f"level: {level!r}; use 1 or 2")
        self._run(self._model.client.sleeper.sleep(level, keeps_kv=keep_kv))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends sleep. After level 2, the weights are those that the model's files hold by then.

        Args:
            tags: As vLLM has them; everything wakes up at once.

        Raises:
            CallError: The weights cannot be loaded; the engine sleeps on.
        """
        self._run(self._model.client.sleeper.wake_up())

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take, in all workers together."""
        return self._model.ready.weight_bytes

    def get_tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters with the defaults of the model's generation configuration."""
        return SamplingParams(**self._model.defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all submitted at once.

        Args:
            prompts: One prompt or several; a list of integers is one prompt of token ids.
            sampling_params: One for all prompts, or one per prompt. Default: the model's defaults.
            use_tqdm: Show a progress bar.
            lora_request: An adapter for all prompts, or one (or None) per prompt; with ``enable_lora=True``.
            priority: A number for all prompts, or one per prompt; lower runs first (with
                ``scheduling_policy="priority"``).

        Returns:
            One result per prompt, in the order of the prompts.

        Raises:
            RequestError: A prompt or a parameter is invalid for the model; nothing was run. It is a ValueError.
            EngineDeadError: The engine died and is not restarted.
        """
        inputs = adapters_of([parse_prompt(prompt) for prompt in as_list(prompts)], lora_request)
        return self._run(self._generate(inputs, self._params(sampling_params, len(inputs)), use_tqdm, priority))

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Finds the most likely continuations by beam search.

        Args:
            prompts: See ``generate``.
            params: Parameters of the search.
            use_tqdm: Show a progress bar.
            concurrency_limit: Maximum number of prompts searched at the same time. None: all.

        Returns:
            The best sequences of each prompt, in the order of the prompts.

        Raises:
            RequestError: A prompt or a parameter is invalid for the model; nothing was run. It is a ValueError.
            EngineDeadError: The engine died and is not restarted.
        """
        if concurrency_limit is not None and concurrency_limit < 1:
            raise RequestError("concurrency_limit must be at least 1", "concurrency_limit")
        inputs = without_images([parse_prompt(prompt) for prompt in as_list(prompts)])
        return self._run(self._beam_search(inputs, params, use_tqdm, concurrency_limit or len(inputs)))

    async def _beam_search(
        self, inputs: list[Input], params: BeamSearchParams, use_tqdm: bool, limit: int
    ) -> list[BeamSearchOutput]:
        model = self._model
        prompts = [await self._token_ids(item, params.as_sampling()) for item in inputs]
        searches = [
            BeamSearch(model, f"beam-search-{index}", ids, params, cache_salt=item.cache_salt)
            for index, (ids, item) in enumerate(zip(prompts, inputs, strict=True))
        ]
        outputs: list[BeamSearchOutput] = []
        with tqdm(total=len(searches), desc="Beam searches", unit="it", disable=not use_tqdm) as bar:
            for begin in range(0, len(searches), max(1, limit)):
                batch = searches[begin : begin + limit]
                for search in batch:
                    search.start()
                try:
                    found = await gather(batch)
                except BeamSearchError as error:
                    raise EngineDeadError(str(error)) from None
                for ids, beams in zip(prompts[begin : begin + limit], found, strict=True):
                    outputs.append(BeamSearchOutput([self._sequence(ids, beam) for beam in beams]))
                    bar.update()
        return outputs

    def _sequence(self, prompt: list[int], beam: Beam) -> BeamSearchSequence:
        tokenizer = self._model.tokenizer
        tokens = prompt + beam.token_ids
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=[describe_position(tokenizer, entry) for entry in beam.logprobs],
            cum_logprob=beam.cum_logprob,
            text=tokenizer.decode(tokens),
            finish_reason=beam.finish_reason,
            stop_reason=beam.stop_reason,
        )

    async def _token_ids(self, item: Input, params: SamplingParams) -> list[int]:
        """The tokens of a prompt, truncated as the parameters ask."""
        ids, around = item.token_ids, NOTHING_ADDED
        if ids is None:
            assert item.text is not None
            around = self._model.tokenizer.added_around(item.add_special_tokens)
            ids = await self._model.tokenize(
                item.text,
                add_special_tokens=item.add_special_tokens,
                any_length=params.truncate_prompt_tokens is not None,
            )
        return truncate_prompt(
            ids,
            params.truncate_prompt_tokens,
            self._model.limits,
            around,
            side=params.truncation_side,
            room=output_room(params.max_tokens),
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRARequests = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several. See ``generate``."""
        template = self._model.chat_template
        if template is None:
            raise RequestError("the model has no chat template; pass chat_template=", "messages")
        options = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
        }
        variables = {**self._config.default_chat_template_kwargs, **(chat_template_kwargs or {})}

        async def render(messages: Sequence[Mapping[str, Any]], **others: bool) -> str:
            return await self._model.host.templates.render(
                template,
                messages,
                "auto",
                {**options, **others},
                variables,
                is_short=True,
                special_tokens=template.special_tokens,
                threads=self._model.host.threads,
            )

        inputs = []
        for given in conversations_of(messages):
            conversation, pictures = self._run(take_offline(self._model.images, given))
            text = self._model.host.templates.render_blocking(
                template,
                conversation,
                options,
                variables,
            )
            opened = self._run(
                conversation_opens_reasoning(
                    self._config.reasoning_parser,
                    render,
                    conversation,
                    text,
                    continues=continue_final_message,
                )
            )
            inputs.append(Input(text, None, add_special_tokens=False, opened=opened, pictures=pictures))
        inputs = adapters_of(inputs, lora_request)
        return self._run(self._generate(inputs, self._params(sampling_params, len(inputs)), use_tqdm, priority))

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            given.verify()
            return [given] * count
        if len(given) != count:
            raise RequestError(
                f"sampling_params must be one, or one per prompt; got {len(given)} for {count} prompts",
                "sampling_params",
            )
        return list(given)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequests = None,
    ) -> list[EmbeddingRequestOutput]:
        """Computes an embedding of each prompt. The option ``pooler_config`` sets the pooling.

        Args:
            prompts: As for ``generate``; a prompt may fill the whole context.
            use_tqdm: Show a progress bar.
            pooling_params: Parameters for all prompts.
            lora_request: As for ``generate``.

        Returns:
            One result per prompt, in the order of the prompts; ``outputs.embedding`` is a list of floats.

        Raises:
            RequestError: A prompt or a parameter is invalid for the model; nothing was run. It is a ValueError.
            RuntimeError: The engine failed on one of the prompts.
            EngineDeadError: The engine died and is not restarted.
        """
        inputs = inputs_of(prompts, lora_request)
        pooled = self._run(self._pooling.run(inputs, pooling_params or PoolingParams(), use_tqdm))
        return [
            EmbeddingRequestOutput(
                item.request_id,
                EmbeddingOutput(item.outputs.data.tolist()),
                item.prompt_token_ids,
                item.num_cached_tokens,
            )
            for item in pooled
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        pooling_task: PoolingTask = "embed",
        lora_request: LoRARequests = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Like ``embed``; ``outputs.data`` is a float32 array.

        Args:
            prompts: As for ``generate``.
            pooling_params: Parameters for all prompts.
            use_tqdm: Show a progress bar.
            pooling_task: ``embed``: one vector per prompt. ``token_embed``: one vector per token. ``classify``,
                ``score``, ``token_classify``: the results of the model's classifier.
            lora_request: As for ``generate``.
        """
        if pooling_task not in POOLING_TASKS:
            known = ", ".join(POOLING_TASKS)
            raise RequestError(f"pooling_task must be one of {known}, got {pooling_task!r}", "pooling_task")
        inputs = inputs_of(prompts, lora_request)
        return self._run(self._pooling.run(inputs, pooling_params or PoolingParams(), use_tqdm, task=pooling_task))

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequests = None,
    ) -> list[ClassificationRequestOutput]:
        """Classifies each prompt with a model that has a classifier. See ``embed``; ``outputs.probs`` is a list."""
        inputs = inputs_of(prompts, lora_request)
        pooled = self._run(self._pooling.run(inputs, pooling_params or PoolingParams(), use_tqdm, task="classify"))
        return [
            ClassificationRequestOutput(
                item.request_id,
                ClassificationOutput(item.outputs.data.tolist()),
                item.prompt_token_ids,
                item.num_cached_tokens,
            )
            for item in pooled
        ]

    def reward(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Rewards of each token, by a reward model: ``encode`` with ``token_classify``. That of a text is its last."""
        return self.encode(
            prompts, pooling_params, use_tqdm=use_tqdm, pooling_task="token_classify", lora_request=lora_request
        )

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[ScoringRequestOutput]:
        """Scores text pairs with a cross-encoder, or by late interaction; with other models, by the similarity of their
        embeddings: the cosine, unless the model's files name another.

        Args:
            data_1: One prompt to compare with each of ``data_2``, or as many prompts as ``data_2``.
            data_2: The prompts to compare with.
            truncate_prompt_tokens: Truncate longer prompts to this many tokens.
            use_tqdm: Show a progress bar.
            pooling_params: Parameters for all pairs, such as ``prompt_name``.
            lora_request: An adapter for all pairs.

        Returns:
            One result per pair, in order; ``outputs.score`` is a float.

        Raises:
            RequestError: The numbers of prompts do not match, or a prompt is invalid for the model.
            EngineDeadError: The engine died and is not restarted.
        """
        params = pooling_params or PoolingParams()
        if truncate_prompt_tokens is not None:
            params = msgspec.structs.replace(params, truncate_prompt_tokens=truncate_prompt_tokens)
        return self._run(
            self._pooling.score(
                inputs_of(data_1, lora_request),
                inputs_of(data_2, lora_request),
                params,
                use_tqdm,
                lora_request,
            )
        )

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = False,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[RerankOutput]:
        """Sorts documents by their scores for a query, best first.

        Args:
            query: The query.
            documents: The documents.
            top_n: Return only this many.
            truncate_prompt_tokens, pooling_params, lora_request: As for ``score``.
            use_tqdm: Show a progress bar.

        Raises:
            RequestError: As for ``score``.
            EngineDeadError: The engine died and is not restarted.
        """
        scored = self.score(
            query,
            list(documents),
            truncate_prompt_tokens=truncate_prompt_tokens,
            use_tqdm=use_tqdm,
            pooling_params=pooling_params,
            lora_request=lora_request,
        )
        results = [RerankOutput(index, documents[index], item.outputs.score) for index, item in enumerate(scored)]
        results.sort(key=lambda result: -result.relevance_score)
        return results[:top_n]

    async def _generate(
        self, inputs: list[Input], params: list[SamplingParams], use_tqdm: bool, priority: int | Sequence[int] | None
    ) -> list[RequestOutput]:
        priorities = [priority or 0] * len(inputs) if priority is None or isinstance(priority, int) else list(priority)
        if len(priorities) != len(inputs):
            raise RequestError(
                f"priority must have one entry per prompt; got {len(priorities)} for {len(inputs)} prompts", "priority"
            )
        model = self._model
        views = [await self._adapters.view(item.adapter) for item in inputs]
        channel = model.client.open_channel()
        folders: list[Folder] = []
        states: list[RequestState] = []
        results: list[RequestOutput] = []
        try:
            for number, (item, sampling) in enumerate(zip(inputs, params, strict=True)):
                ids = await self._token_ids(item, sampling)
                ids, features = await place_offline(model.images, ids, item.images, item.pictures)
                result = RequestOutput(str(next(self._ids)), item.text, ids, None, [])
                results.append(result)
                request = model.resolve(
                    sampling,
                    opened=item.opened,
                    priority=priorities[number],
                    cache_salt=item.cache_salt,
                    mm_features=features,
                )
                await views[number].submit(
                    channel, result.request_id, [ids], request, states, first_choice=len(folders)
                )
                for index in range(sampling.num_completions):
                    output = CompletionOutput(index)
                    result.outputs.append(output)
                    folders.append(Folder(model.tokenizer, result, output, sampling))
            meter = SpeedMeter()
            with tqdm(total=len(folders), desc="Completions", unit="it", disable=not use_tqdm, delay=1) as bar:
                unfinished = len(folders)
                while unfinished:
                    for delta in await channel.take():
                        folder = folders[delta.choice]
                        folder.add(delta)
                        if delta.finish_reason is not None:
                            unfinished -= 1
                            meter.add(bar, folder.num_new_prompt_tokens, len(folder.output.token_ids))
                            bar.update()
                            if delta.error is not None and model.client.dead is not None:
                                raise EngineDeadError(delta.error)
        finally:
            model.client.abort(states)
        position = 0
        for result in results:
            own = states[position : position + len(result.outputs)]
            result.num_cached_tokens = own[0].num_cached_tokens
            result.metrics = request_stats(own)
            position += len(result.outputs)
        for result, sampling in zip(results, params, strict=True):
            if sampling.num_completions > sampling.n:
                keep_best(result, sampling)
        return results


def _end(engine: EngineThread, machines: ExitStack) -> None:
    with machines:
        engine.close()


async def _start(engine: EngineThread, config: ServerConfig, files: ModelFiles) -> ServedModel:
    metrics = EngineMetrics(files.name, engine=config.first_replica)
    bar = LoadBar()
    client = create_engines(config, lambda: files.tokenizer, metrics, on_progress=bar.update)
    engine.client = client
    try:
        ready: EngineReady = await client.start()
    finally:
        bar.close()
    return ServedModel(Host(config), files, client, metrics, ready)


def _signature() -> inspect.Signature:
    """The signature that consoles and notebooks use for completion; they inspect the object, not its types."""
    hints = get_type_hints(LLMOptions)
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint) for name, hint in hints.items()]
    model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="", annotation=str)
    return inspect.Signature([model, *(parameter.replace(default=...) for parameter in named)])


LLM.__signature__ = _signature()  # type: ignore[attr-defined]

__all__ = ["LLM", "BeamSearchOutput", "BeamSearchSequence", "CompletionOutput", "Logprob", "RequestOutput"]
