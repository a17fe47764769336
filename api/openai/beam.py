"""Beam search over HTTP: a generation whose choices arrive whole, at the end of the search."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from api.engine.channel import Delta
from api.engine.queue_bound import NOBODY, Tenant
from api.errors import EngineDeadError, RequestError
from api.generation.beam_search import Beam, BeamSearch, BeamSearchError, BeamSearchParams, gather
from api.generation.generation import Generation
from api.generation.served_model import ServedModel
from api.generation.usage import Usage
from api.http.errors import INTERNAL
from api.openai.protocol import CompletionRequest, GenerationRequest
from api.openai.sampling import stream_interval
from api.params.sampling import SamplingParams
from api.text.detokenizer import IncrementalDetokenizer
from engine_core.launch import get_logger
from engine_core.messages import GrammarSpec, MultiModalFeature

logger = get_logger()


def _refused_fields(request: GenerationRequest) -> dict[str, bool]:
    """Fields that beam search does not support, and whether they are used."""
    return {
        "best_of": isinstance(request, CompletionRequest) and bool(request.best_of),
        "stop": bool(request.stop),
        "stop_regex": bool(request.stop_regex),
        "thinking_token_budget": bool(request.thinking_token_budget),
        "min_tokens": bool(request.min_tokens),
        "logit_bias": bool(request.logit_bias),
        "allowed_token_ids": bool(request.allowed_token_ids),
        "bad_words": bool(request.bad_words),
        "prompt_logprobs": bool(request.prompt_logprobs),
        "logprob_token_ids": bool(request.logprob_token_ids),
        "repetition_detection": request.repetition_detection is not None,
    }


def _penalties(request: GenerationRequest) -> dict[str, bool]:
    """Penalties, and whether they have an effect."""
    return {
        "presence_penalty": request.presence_penalty not in (None, 0),
        "frequency_penalty": request.frequency_penalty not in (None, 0),
        "repetition_penalty": request.repetition_penalty not in (None, 1),
    }


def beam_search_params(
    request: GenerationRequest, grammar: GrammarSpec | None, *, max_tokens: int | None, logprobs: int | None
) -> BeamSearchParams:
    """The search parameters of a request.

    Args:
        request: A request with ``use_beam_search``.
        grammar: The request's constraint. Beam search supports none, so it is rejected.
        max_tokens: Maximum length of a completion.
        logprobs: Number of most likely tokens to report per position.

    Raises:
        RequestError: A field is out of range, or not supported with beam search.
    """
    if request.stream:
        raise RequestError(
            "use_beam_search does not support stream: the best sequence is known only at the end", "use_beam_search"
        )
    if isinstance(request, CompletionRequest) and request.echo and logprobs is not None:
        raise RequestError("use_beam_search does not support echo with logprobs", "echo")
    for name, is_asked in _refused_fields(request).items():
        if is_asked:
            raise RequestError(f"use_beam_search does not support {name}", name)
    if grammar is not None:
        raise RequestError(f"use_beam_search does not support {grammar.param}", grammar.param)
    for name, is_asked in _penalties(request).items():
        if is_asked:
            raise RequestError(f"use_beam_search does not support {name}", name)
    return BeamSearchParams(
        beam_width=1 if request.n is None else request.n,
        max_tokens=max_tokens,
        ignore_eos=bool(request.ignore_eos),
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        stop_token_ids=request.stop_token_ids,
        logprobs=logprobs,
    )


def create_generation(
    model: ServedModel,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | BeamSearchParams,
    request: GenerationRequest,
    grammar: GrammarSpec | None,
    *,
    opened: bool | UnsetType | None = UNSET,
    kept_special_ids: frozenset[int] = frozenset(),
    tenant: Tenant = NOBODY,
    mm_features: tuple[MultiModalFeature, ...] = (),
) -> Generation:
    """Resolves a request into a generation, which runs once its ``start`` is called.

    Args:
        model: The model.
        request_id: Id of the answer.
        prompts: Token ids.
        params: Sampling or search parameters.
        request: The request, for all other fields.
        grammar: Constraint on the outputs.
        opened: Whether the conversation's prompt has opened or closed the reasoning; see ``ServedModel.resolve``.
        kept_special_ids: Special tokens to keep in the text when others are skipped.
        tenant: The client's tenant.
        mm_features: Images of the prompt.

    Raises:
        RequestError: A parameter is invalid for the model.
    """
    if isinstance(params, BeamSearchParams):
        if mm_features:
            raise RequestError("use_beam_search does not support images", "use_beam_search")
        return BeamGeneration(model, request_id, prompts, params, request, kept_special_ids, tenant)
    resolved = model.resolve(
        params,
        grammar=grammar,
        when=request.structured_outputs,
        opened=opened,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        kept_special_ids=kept_special_ids,
        tenant=tenant,
        mm_features=mm_features,
    )
    interval = stream_interval(model.config, request)
    return Generation(model, request_id, prompts, params, resolved, stream_interval=interval)


class BeamGeneration(Generation):
    """One search per prompt; choice ``p * width + i`` is the sequence of rank ``i`` of prompt ``p``."""

    def __init__(
        self,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: BeamSearchParams,
        request: GenerationRequest,
        kept_special_ids: frozenset[int],
        tenant: Tenant,
    ) -> None:
        """Nothing runs before ``start``."""
        super().__init__(model, request_id, prompts, params, None)
        self._width = params.beam_width
        self._beam_params = params
        self._fields = request
        self._kept_special_ids = kept_special_ids
        self._tenant = tenant
        self._searches: list[BeamSearch] = []
        self._task: asyncio.Task[None] | None = None
        self._num_output_tokens = 0

    async def submit(self) -> None:
        request = self._fields
        self._searches = [
            BeamSearch(
                self._model,
                f"{self.request_id}-{index}",
                prompt,
                self._beam_params,
                priority=request.priority or 0,
                cache_salt=request.cache_salt or "",
                tenant=self._tenant,
                data_parallel_rank=self.data_parallel_rank,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        for search in self._searches:
            search.start()
            self._model.metrics.on_request(self._width, self._beam_params.max_tokens or 0)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            for index, beams in enumerate(await gather(self._searches)):
                self._deliver(index, beams)
        except (BeamSearchError, EngineDeadError) as error:
            self._channel.push(Delta(0, finish_reason="error", error=str(error)))
        except Exception as error:
            logger.error("request %s failed", self.request_id, exc_info=error)
            self._channel.push(Delta(0, finish_reason="error", error=INTERNAL))

    def _deliver(self, index: int, beams: list[Beam]) -> None:
        """Pushes one delta per sequence."""
        for rank, beam in enumerate(beams):
            self._num_output_tokens += len(beam.token_ids)
            self._channel.push(
                Delta(
                    index * self._width + rank,
                    self._text(index, beam),
                    tuple(beam.token_ids),
                    tuple(beam.logprobs),
                    (),
                    beam.finish_reason,
                    beam.stop_reason,
                )
            )

    def _text(self, index: int, beam: Beam) -> str:
        request = self._fields
        detokenizer = IncrementalDetokenizer(
            self._model.tokenizer,
            self.prompts[index][-64:],
            request.skip_special_tokens is not False,
            request.spaces_between_special_tokens is not False,
            self._kept_special_ids,
        )
        return detokenizer.extend(beam.token_ids) + detokenizer.finish()

    def drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        for search in self._searches:
            search.abort()

    def usage(self, num_output_tokens: int | None = None) -> Usage:
        """Usage of all returned choices."""
        cached = sum(search.num_cached_tokens for search in self._searches)
        return self.count_usage(self._num_output_tokens if num_output_tokens is None else num_output_tokens, cached)
