"""Embeddings, classes and scores of the offline class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from msgspec.structs import replace
from tqdm import tqdm

from api.engine.progress import SpeedMeter
from api.engine.request_state import RequestState
from api.errors import RequestError
from api.generation.adapters import Adapters
from api.generation.served_model import ServedModel
from api.llm_inputs import Input, text_of
from api.model.tokenizer import NOTHING_ADDED
from api.params.lora import LoRARequest
from api.params.pooling import (
    POOLING_TASKS,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    PoolingTask,
    ScoringOutput,
    ScoringRequestOutput,
    is_cross_encoder,
    pair_up,
)
from api.params.truncation import check_truncation, truncate_prompt
from engine_core.messages import ResolvedPoolingParams

Pooled = PoolingRequestOutput[PoolingOutput]


class PoolingRunner:
    """Runs pooling requests."""

    def __init__(self, model: ServedModel, adapters: Adapters, ids: Iterator[int]) -> None:
        """``ids`` numbers the requests."""
        self._model = model
        self._adapters = adapters
        self._ids = ids

    async def run(
        self, inputs: Sequence[Input], params: PoolingParams, use_tqdm: bool, *, task: PoolingTask = "embed"
    ) -> list[Pooled]:
        """Pools prompts. Raises RequestError."""
        model = self._model
        resolved = model.pooling_params(task, params)
        if model.sentences.late is not None and task == "token_embed":
            return await self._pool_late([(item, False) for item in inputs], params, resolved, use_tqdm)
        adapter, name = self._task_adapter(params.task), params.prompt_name
        if name is None and params.task in model.sentences.prompts:
            name = params.task
        prompt = model.prompt_before(name)
        resolved = replace(resolved, num_skipped=await model.num_skipped(name))
        prompts = [await self._prompt(item, prompt, params.truncate_prompt_tokens) for item in inputs]
        views = [await self._adapters.view(item.adapter or adapter) for item in inputs]
        pooled = await self._submit(prompts, [resolved] * len(prompts), use_tqdm, views)
        if task in ("token_embed", "token_classify"):
            for item in pooled:
                item.outputs.data = model.counted_rows(item.outputs.data, item.prompt_token_ids)
        return pooled

    def _task_adapter(self, task: str | None) -> LoRARequest | None:
        """The adapter of a task. Raises RequestError if there is none."""
        if task is None or task in POOLING_TASKS:
            return None
        tasks = self._model.tasks
        if task not in tasks:
            known = f"choose from {', '.join(tasks)}" if tasks else "the model has none"
            raise RequestError(f"task {task!r} is unknown; {known}", "task")
        return LoRARequest(task, 1 + list(tasks).index(task), str(tasks[task]))

    async def _prompt(self, item: Input, prompt: str, keep: int | None) -> list[int]:
        model, ids, around = self._model, item.token_ids, NOTHING_ADDED
        if ids is None:
            assert item.text is not None
            around = model.tokenizer.added_around(item.add_special_tokens)
            ids = await model.tokenize(
                prompt + item.text, add_special_tokens=item.add_special_tokens, any_length=keep is not None
            )
        return truncate_prompt(ids, keep, model.limits, around)

    async def _pool_late(
        self,
        texts: Sequence[tuple[Input, bool]],
        params: PoolingParams,
        resolved: ResolvedPoolingParams,
        use_tqdm: bool,
    ) -> list[Pooled]:
        """Vectors of the tokens of texts that count, queries or documents."""
        model, keep = self._model, params.truncate_prompt_tokens
        check_truncation(keep, model.limits)
        prompts, each = [], []
        kept: list[list[int] | None] = []
        for item, is_query in texts:
            if item.text is None:
                prompts.append(await self._prompt(item, "", keep))
                each.append(resolved)
                kept.append(None)
                continue
            prompt = await model.tokenize_late(item.text, is_query=is_query, max_tokens=max(0, keep or 0))
            prompts.append(prompt.token_ids)
            each.append(replace(resolved, num_attended=prompt.num_attended))
            kept.append(prompt.kept)
        views = [await self._adapters.view(item.adapter) for item, _ in texts]
        pooled = await self._submit(prompts, each, use_tqdm, views)
        for output, places in zip(pooled, kept, strict=True):
            if places is not None:
                output.outputs.data = output.outputs.data[places]
        return pooled

    async def score(
        self,
        first: list[Input],
        second: list[Input],
        params: PoolingParams,
        use_tqdm: bool,
        adapter: LoRARequest | None,
    ) -> list[ScoringRequestOutput]:
        """Scores pairs; see ``LLM.score``."""
        model = self._model
        pairs = pair_up(len(first), len(second), "data_2")
        results = []
        if is_cross_encoder(model.limits):
            texts = [(text_of(first[i], "data_1"), text_of(second[j], "data_2")) for i, j in pairs]
            for item in await self._score_pairs(texts, params, use_tqdm, adapter):
                score = ScoringOutput(float(item.outputs.data[0]))
                results.append(ScoringRequestOutput(item.request_id, score, item.prompt_token_ids))
            return results
        if model.sentences.late is not None:
            resolved = model.pooling_params("token_embed", params)
            sides = [*((item, True) for item in first), *((item, False) for item in second)]
            pooled = await self._pool_late(sides, params, resolved, use_tqdm)
        else:
            pooled = await self.run([*first, *second], params, use_tqdm)
        compare = model.similarity
        for one, other in ((pooled[i], pooled[len(first) + j]) for i, j in pairs):
            score = ScoringOutput(compare(one.outputs.data, other.outputs.data))
            ids = one.prompt_token_ids + other.prompt_token_ids
            cached = one.num_cached_tokens + other.num_cached_tokens
            results.append(ScoringRequestOutput(f"{one.request_id}-{other.request_id}", score, ids, cached))
        return results

    async def _score_pairs(
        self, pairs: list[tuple[str, str]], params: PoolingParams, use_tqdm: bool, adapter: LoRARequest | None
    ) -> list[Pooled]:
        """The scores of a cross-encoder."""
        model, keep = self._model, params.truncate_prompt_tokens
        own = model.pooling_params("score", params)
        check_truncation(keep, model.limits)
        limit = model.limits.max_model_len if keep == -1 else keep or 0
        prompts, resolved = [], []
        for first, second in pairs:
            ids, segment = await model.tokenize_pair(first, second, max_tokens=limit, prompt_name=params.prompt_name)
            prompts.append(ids)
            resolved.append(replace(own, second_segment=segment))
        return await self._submit(prompts, resolved, use_tqdm, [await self._adapters.view(adapter)] * len(pairs))

    async def _submit(
        self,
        prompts: list[list[int]],
        params: list[ResolvedPoolingParams],
        use_tqdm: bool,
        views: list[ServedModel],
    ) -> list[Pooled]:
        model = self._model
        channel = model.client.open_channel()
        ids = [str(next(self._ids)) for _ in prompts]
        states: list[RequestState] = []
        try:
            for view, group in groupby(range(len(prompts)), key=views.__getitem__):
                first, *others = group
                own = slice(first, first + 1 + len(others))
                await view.submit_pooling(
                    channel, ids[first], prompts[own], params[own], states, field="prompts", first_choice=first
                )
            meter = SpeedMeter()
            with tqdm(total=len(states), desc="Prompts", unit="it", disable=not use_tqdm, delay=1) as bar:
                unfinished = len(states)
                while unfinished:
                    for delta in await channel.take():
                        if delta.error is not None:
                            raise model.client.dead or RuntimeError(delta.error)
                        unfinished -= 1
                        meter.add(bar, len(prompts[delta.choice]), 0)
                        bar.update()
        finally:
            model.client.abort(states)
        results = []
        for request_id, state, prompt in zip(ids, states, prompts, strict=True):
            assert state.pooling_output is not None
            output = PoolingOutput(state.pooling_output)
            results.append(PoolingRequestOutput(request_id, output, prompt, state.num_cached_tokens))
        return results
