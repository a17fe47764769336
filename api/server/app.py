"""The ASGI application: the route table and the middleware. No logic."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from api.anthropic import messages
from api.anthropic import protocol as anthropic
from api.anthropic.errors import ANTHROPIC_ERRORS
from api.config import ServerConfig
from api.generation.serving import Serving
from api.http.errors import EXCEPTION_HANDLERS, OPENAI_ERRORS, WithErrorShape
from api.http.tenants import QueueGate
from api.http.traffic import Traffic
from api.openai import (
    adapters,
    chat,
    classify,
    cohere,
    completions,
    embeddings,
    invocations,
    models,
    pooling_protocol,
    protocol,
    scoring,
    tokenize,
)
from api.responses import endpoints as responses
from api.responses import protocol as responses_protocol
from api.responses.errors import RESPONSES_ERRORS
from api.responses.store import ResponseStore
from api.server import monitoring, sleeping
from api.server.middleware import AllowedHosts, Guard, RequestScope, UnderPrefix, WhileConnected, allowed_hosts
from api.server.openapi import Document, Operation
from api.server.web_routes import WebPages


def _has_admin(config: ServerConfig) -> bool:
    """Whether anybody may change the server."""
    return bool(config.admin_api_key)


OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        chat.create_chat_completion,
        "Answer a conversation",
        request=protocol.ChatCompletionRequest,
        response=protocol.ChatCompletionResponse,
        chunk=protocol.ChatCompletionChunk,
        task="generate",
        queues=True,
    ),
    Operation(
        "POST",
        "/v1/completions",
        completions.create_completion,
        "Complete texts",
        request=protocol.CompletionRequest,
        response=protocol.CompletionResponse,
        chunk=protocol.CompletionResponse,
        task="generate",
        queues=True,
    ),
    Operation(
        "POST",
        "/v1/embeddings",
        embeddings.create_embedding,
        "Embed texts",
        request=pooling_protocol.EmbeddingRequest,
        example={"input": ["one text", "another"]},
        response=pooling_protocol.EmbeddingResponse,
        task="pool",
        queues=True,
    ),
    Operation(
        "POST",
        "/v2/embed",
        cohere.embed,
        "Embed texts (Cohere's API)",
        request=cohere.CohereEmbedRequest,
        example={"texts": ["one text", "another"], "input_type": "search_document"},
        response=cohere.CohereEmbedResponse,
        task="pool",
        queues=True,
    ),
    Operation(
        "POST",
        "/classify",
        classify.classify,
        "Classify texts",
        request=pooling_protocol.ClassifyRequest,
        example={"input": ["one text", "another"]},
        response=pooling_protocol.ClassifyResponse,
        task="pool",
        queues=True,
    ),
    Operation(
        "POST",
        "/pooling",
        classify.pool,
        "Pool texts into vectors or classes, or their tokens",
        request=pooling_protocol.PoolRequest,
        example={"input": ["one text", "another"]},
        response=pooling_protocol.PoolResponse,
        task="pool",
        queues=True,
    ),
    *(
        Operation(
            "POST",
            path,
            handler,
            "Score the similarity of texts",
            request=pooling_protocol.ScoreRequest,
            example={"queries": "Where is Paris?", "documents": ["Paris is in France.", "Cheese is made of milk."]},
            response=pooling_protocol.ScoreResponse,
            task="pool",
            queues=True,
        )
        for path, handler in (("/score", scoring.score), ("/v1/score", scoring.v1_score))
    ),
    *(
        Operation(
            "POST",
            path,
            handler,
            "Rank documents by similarity to a query",
            request=pooling_protocol.RerankRequest,
            example={"query": "Where is Paris?", "documents": ["Paris is in France.", "Cheese is made of milk."]},
            response=pooling_protocol.RerankResponse,
            task="pool",
            queues=True,
        )
        for path, handler in (
            ("/rerank", scoring.rerank),
            ("/v1/rerank", scoring.v1_rerank),
            ("/v2/rerank", scoring.v2_rerank),
        )
    ),
    Operation(
        "POST",
        "/v1/messages",
        messages.create_message,
        "Answer a conversation (Anthropic's API)",
        request=anthropic.MessagesRequest,
        response=anthropic.Message,
        chunk=anthropic.StreamEvent,
        errors=ANTHROPIC_ERRORS,
        task="generate",
        queues=True,
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        messages.count_tokens,
        "Count the tokens of a conversation (Anthropic's API)",
        request=anthropic.ConversationRequest,
        response=anthropic.MessageTokensCount,
        errors=ANTHROPIC_ERRORS,
        task="generate",
    ),
    Operation(
        "POST",
        "/v1/responses",
        responses.create_response,
        "Create a response, and store it",
        request=responses_protocol.ResponsesRequest,
        response=responses_protocol.ResponseObject,
        chunk=responses_protocol.ResponseEvent,
        errors=RESPONSES_ERRORS,
        task="generate",
        queues=True,
    ),
    Operation(
        "GET",
        "/v1/responses/{response_id}",
        responses.retrieve_response,
        "Get a stored response",
        response=responses_protocol.ResponseObject,
        chunk=responses_protocol.ResponseEvent,
        errors=RESPONSES_ERRORS,
        task="generate",
    ),
    Operation(
        "DELETE",
        "/v1/responses/{response_id}",
        responses.delete_response,
        "Delete a response",
        response=responses_protocol.DeletedResponse,
        errors=RESPONSES_ERRORS,
        task="generate",
    ),
    Operation(
        "POST",
        "/v1/responses/{response_id}/cancel",
        responses.cancel_response,
        "Cancel a background response",
        response=responses_protocol.ResponseObject,
        errors=RESPONSES_ERRORS,
        task="generate",
    ),
    Operation("GET", "/v1/models", models.list_models, "List the models", response=protocol.ModelList),
    Operation("GET", "/v1/models/{model:path}", models.retrieve_model, "Get a model", response=protocol.ModelCard),
    *(
        Operation(
            "POST",
            path,
            handler,
            summary,
            request=kind,
            media_type="text/plain",
            is_wanted=lambda config: config.offers_adapter_changes,
            is_admin=True,
        )
        for path, handler, summary, kind in (
            (
                "/v1/load_lora_adapter",
                adapters.load_lora_adapter,
                "Load a LoRA adapter",
                adapters.LoadLoRAAdapterRequest,
            ),
            (
                "/v1/unload_lora_adapter",
                adapters.unload_lora_adapter,
                "Unload a LoRA adapter",
                adapters.UnloadLoRAAdapterRequest,
            ),
        )
    ),
    Operation(
        "POST",
        "/tokenize",
        tokenize.tokenize,
        "Tokenise a text or a conversation",
        request=protocol.TokenizeRequest,
        response=protocol.TokenizeResponse,
    ),
    Operation(
        "POST",
        "/detokenize",
        tokenize.detokenize,
        "Detokenise token ids",
        request=protocol.DetokenizeRequest,
        response=protocol.DetokenizeResponse,
    ),
    Operation(
        "GET",
        "/tokenizer_info",
        tokenize.tokenizer_info,
        "Get the tokenizer's configuration",
        response=protocol.TokenizerInfo,
        is_wanted=lambda config: config.enable_tokenizer_info_endpoint,
    ),
    Operation(
        "POST",
        "/invocations",
        invocations.invoke,
        "Forward to the endpoint that matches the body's fields (SageMaker)",
        request=invocations.Invocation,
        example={"prompt": "Hi", "max_tokens": 8},
        queues=True,
    ),
    Operation(
        "POST",
        "/sleep",
        sleeping.sleep,
        "Free memory until /wake_up",
        query=sleeping.SleepQuery,
        response=sleeping.SleepState,
        is_wanted=_has_admin,
        is_admin=True,
    ),
    Operation(
        "POST",
        "/wake_up",
        sleeping.wake_up,
        "End sleep",
        query=sleeping.WakeUpQuery,
        response=sleeping.SleepState,
        is_wanted=_has_admin,
        is_admin=True,
    ),
    Operation(
        "POST",
        "/reload_weights",
        sleeping.reload_weights,
        "Load the weights again from the model's files",
        response=sleeping.SleepState,
        is_wanted=_has_admin,
        is_admin=True,
    ),
    Operation(
        "GET",
        "/is_sleeping",
        sleeping.is_sleeping,
        "Check whether the server sleeps",
        response=sleeping.SleepState,
        is_wanted=_has_admin,
    ),
    Operation("GET", "/health", monitoring.health, "Check whether the server accepts requests", is_open=True),
    Operation("GET", "/ping", monitoring.ping, "Alias of /health", is_open=True),
    *(
        Operation("GET", path, handler, summary, media_type="text/plain", is_open=True)
        for path, handler, summary in (
            ("/livez", monitoring.livez, "Liveness: 503 if the server must be restarted"),
            ("/readyz", monitoring.readyz, "Readiness: 503 while requests would have to wait for the engine"),
            ("/startupz", monitoring.startupz, "Startup: 503 until the model is loaded"),
        )
    ),
    Operation(
        "GET", "/version", monitoring.version, "Get the version", response=monitoring.VersionResponse, is_open=True
    ),
    Operation("GET", "/load", monitoring.load, "Get the load", response=monitoring.LoadResponse, is_open=True),
    Operation("GET", "/metrics", monitoring.metrics, "Metrics for Prometheus", media_type="text/plain", is_open=True),
)


DOCS_PATHS = ("/docs", "/openapi.json")
"""Pages that ``--disable-fastapi-docs`` turns off."""


def create_app(serving: Serving, traffic: Traffic) -> Starlette:
    """Builds the application.

    Args:
        serving: The served models; their engines are ready.
        traffic: Counts requests and knows whether new ones are accepted.
    """
    config = serving.config
    offered = {"generate": config.offers_generation, "pool": config.offers_pooling}
    public = [
        operation
        for operation in OPERATIONS
        if (operation.task is None or offered[operation.task]) and operation.is_wanted(config)
    ]
    document = Document(public, has_keys=bool(config.api_key), root_path=config.root_path)
    shown = Operation("GET", "/openapi.json", document.show, "Get this document")
    hidden = DOCS_PATHS if config.disable_fastapi_docs else ()
    operations = (*public, *(row for row in (shown, *WebPages().operations()) if row.path not in hidden))
    app = Starlette(
        routes=_routes(operations, config, traffic),
        middleware=_middleware(operations, config, traffic),
        exception_handlers=dict(EXCEPTION_HANDLERS),
    )
    # A redirect would send clients to any host that their request names.
    app.router.redirect_slashes = False
    app.state.serving = serving
    app.state.traffic = traffic
    app.state.responses = ResponseStore(config.max_stored_responses, config.max_stored_response_bytes)
    return app


def _routes(operations: Sequence[Operation], config: ServerConfig, traffic: Traffic) -> list[Route]:
    """The routes, with their guards."""
    guard = Middleware(Guard, traffic=traffic, keys=config.api_key)
    admin_guard = Middleware(Guard, traffic=traffic, keys=config.admin_api_key)
    watch_guard = Middleware(Guard, traffic=traffic, keys=config.api_key, drains=False)
    guarded = ("/metrics", "/load") if config.metrics_require_key else ()
    return [
        Route(
            operation.path,
            operation.handler,
            methods=[operation.method],
            middleware=[
                *([] if operation.errors is OPENAI_ERRORS else [Middleware(WithErrorShape, shape=operation.errors)]),
                *([] if operation.is_open else [admin_guard if operation.is_admin else guard]),
                *([watch_guard] if operation.path in guarded else []),
                Middleware(WhileConnected),
                *([Middleware(QueueGate)] if operation.queues else []),
            ],
        )
        for operation in operations
    ]


def _middleware(operations: Sequence[Operation], config: ServerConfig, traffic: Traffic) -> list[Middleware]:
    """The middleware of all endpoints, outermost first."""
    middleware = [
        Middleware(
            RequestScope,
            traffic=traffic,
            handler_names={operation.handler: operation.path for operation in operations},
            echo_ids=config.enable_request_id_headers,
            log_requests=not config.disable_access_log,
        )
    ]
    hosts = allowed_hosts(config)
    if hosts is not None:
        middleware.append(Middleware(AllowedHosts, names=hosts))
    if config.root_path:
        middleware.insert(0, Middleware(UnderPrefix, prefix=config.root_path))
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=config.allowed_methods,
                allow_headers=config.allowed_headers,
                allow_credentials=config.allow_credentials,
            )
        )
    return middleware
