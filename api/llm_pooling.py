"""Runs the pooling requests of ``LLM``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from msgspec.structs import replace
from tqdm import tqdm

from api.engine.progress import SpeedMeter
from api.engine.request_state import RequestState
from api.generation.adapters import Adapters
from api.generation.served_model import ServedModel
from api.llm_inputs import Input
from api.model.tokenizer import NOTHING_ADDED
from api.params.lora import LoRARequest
from api.params.pooling import PoolingOutput, PoolingParams, PoolingRequestOutput, PoolingTask, resolve_task
from api.params.truncation import check_truncation, truncate_prompt
from engine_core.messages import ResolvedPoolingParams


class PoolingRunner:
    """Has prompts pooled and waits for the results, in the event loop of the engine."""

    def __init__(self, model: ServedModel, adapters: Adapters, ids: Iterator[int]) -> None:
        """``ids`` numbers the requests."""
        self._model = model
        self._adapters = adapters
        self._ids = ids

    async def score_pairs(
        self, pairs: list[tuple[str, str]], params: PoolingParams, use_tqdm: bool, adapter: LoRARequest | None
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The scores of a cross-encoder for pairs of texts; the rest is as for ``run``."""
        model, keep = self._model, params.truncate_prompt_tokens
        own = resolve_task("score", params, model.pooler, model.limits)
        check_truncation(keep, model.limits)
        limit = model.limits.max_model_len if keep == -1 else keep or 0
        prompts, resolved = [], []
        for first, second in pairs:
            ids, segment = await model.tokenize_pair(first, second, max_tokens=limit)
            prompts.append(ids)
            resolved.append(replace(own, second_segment=segment))
        return await self._submit(prompts, resolved, use_tqdm, [await self._adapters.view(adapter)] * len(pairs))

    async def run(
        self, inputs: list[Input], params: PoolingParams, use_tqdm: bool, *, task: PoolingTask = "embed"
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The vectors of prompts.

        Args:
            inputs: The prompts.
            params: Parameters of all of them.
            use_tqdm: Show a progress bar.
            task: What to compute.
        """
        model = self._model
        resolved = resolve_task(task, params, model.pooler, model.limits)
        prompt = model.prompt_before(params.prompt_name)
        resolved = replace(resolved, num_skipped=await model.num_skipped(params.prompt_name))
        keep = params.truncate_prompt_tokens
        prompts = []
        for item in inputs:
            ids, around = item.token_ids, NOTHING_ADDED
            if ids is None:
                assert item.text is not None
                any_length = keep is not None
                around = model.tokenizer.added_around(item.add_special_tokens)
                text = prompt + item.text
                ids = await model.tokenize(text, add_special_tokens=item.add_special_tokens, any_length=any_length)
            prompts.append(truncate_prompt(ids, keep, model.limits, around))
        views = [await self._adapters.view(item.adapter) for item in inputs]
        return await self._submit(prompts, [resolved] * len(prompts), use_tqdm, views)

    async def _submit(
        self,
        prompts: list[list[int]],
        params: list[ResolvedPoolingParams],
        use_tqdm: bool,
        views: list[ServedModel],
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
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
