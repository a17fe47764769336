"""No route lets anyone in without a key, but those that are open on purpose."""

from __future__ import annotations

import pytest
from starlette.routing import Route

from api.config import ServerConfig
from api.server.app import OPERATIONS
from tests.fakes import Connection, FakeServer, config_with_all_routes
from tests.unit.conftest import Api, error_of

KEYS = ["first-key", "zwölf"]
OPEN = {"/health", "/ping", "/livez", "/readyz", "/startupz", "/version", "/load", "/metrics"}
PATHS = sorted(
    {operation.path.replace("{model:path}", "fake-model") for operation in OPERATIONS if "_id}" not in operation.path}
    | {"/openapi.json"}
)
STORED = sorted({operation.path for operation in OPERATIONS if "_id}" in operation.path})
"""Paths with ids, which must exist for a good answer."""
Headers = list[tuple[bytes, bytes]]

BAD_HEADERS: list[Headers] = [
    [],
    [(b"authorization", b"")],
    [(b"authorization", b"Bearer")],
    [(b"authorization", b"Bearer ")],
    [(b"authorization", b"Bearer wrong")],
    [(b"authorization", b"Bearer first-ke")],
    [(b"authorization", b"Bearer first-keys")],
    [(b"authorization", b"Bearer FIRST-KEY")],
    [(b"authorization", b"Basic first-key")],
    [(b"authorization", b"first-key")],
    [(b"authorization", b"Bearer \xff\xfe")],
    [(b"authorization", b"Bearer " + b"x" * 100_000)],
    [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer first-key")],
    [(b"x-api-key", b"")],
    [(b"x-api-key", b"Bearer first-key")],
    [(b"x-api-key", b"wrong"), (b"x-api-key", b"first-key")],
    [(b"x-api-key", b"wrong"), (b"authorization", b"first-key")],
    [(b"host", b"127.0.0.1")],
    [(b"host", b"evil.example/health")],
    [(b"host", b"")],
    [(b"x-forwarded-for", b"127.0.0.1"), (b"x-forwarded-prefix", b"/health")],
    [(b"x-original-url", b"/health"), (b"x-rewrite-url", b"/health")],
    [(b"x-http-method-override", b"OPTIONS")],
    [(b"upgrade", b"websocket"), (b"connection", b"upgrade")],
]


@pytest.fixture(scope="module")
def guarded() -> FakeServer:
    return FakeServer(config_with_all_routes(api_key=KEYS, admin_api_key=KEYS))


async def status(server: FakeServer, method: str, path: str, headers: Headers) -> int | None:
    connection = Connection(server.app, path, b"{}", headers, method=method)
    await connection.task
    return connection.status


def methods(server: FakeServer, path: str) -> list[str]:
    routes = [route for route in server.app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return sorted(method for route in routes for method in route.methods or ())


def test_every_route_is_guarded_or_named_as_open(guarded: FakeServer) -> None:
    """What a new route is by default."""
    assert {operation.path for operation in OPERATIONS if operation.is_open} == OPEN
    assert all(isinstance(route, Route) for route in guarded.app.routes)
    assert len(guarded.app.routes) == len(OPERATIONS) + 4


@pytest.mark.parametrize("path", [path for path in (*PATHS, *STORED) if path not in OPEN])
@pytest.mark.parametrize("headers", BAD_HEADERS)
async def test_bad_keys(guarded: FakeServer, path: str, headers: Headers) -> None:
    for method in methods(guarded, path):
        assert await status(guarded, method, path, headers) == 401


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", ["Bearer first-key", "bearer first-key", "Bearer  first-key ", "Bearer zwölf"])
async def test_good_keys(guarded: FakeServer, path: str, header: str) -> None:
    for method in methods(guarded, path):
        assert await status(guarded, method, path, [(b"authorization", header.encode())]) in (200, 400)


@pytest.mark.parametrize("path", PATHS)
async def test_good_keys_in_the_other_header(guarded: FakeServer, path: str) -> None:
    for headers in ([(b"x-api-key", b"first-key")], [(b"x-api-key", b"first-key"), (b"authorization", b"Bearer no")]):
        for method in methods(guarded, path):
            assert await status(guarded, method, path, headers) in (200, 400)


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_open_routes(guarded: FakeServer, path: str) -> None:
    assert await status(guarded, "GET", path, []) == 200


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/models/../../health",
        "/health/../v1/models",
        "/health/v1/models",
        "/health;/v1/models",
        "/v1/models;/health",
        "/V1/models",
        "/metrics/",
        "v1/models",
        "",
        "/v1/models\0",
        "/.//v1/models",
    ],
)
async def test_tricks_with_paths(guarded: FakeServer, path: str) -> None:
    for method in ("GET", "HEAD", "POST", "OPTIONS", "TRACE", "get"):
        assert await status(guarded, method, path, []) in (401, 404, 405)


async def test_the_answer_to_a_bad_key(guarded: FakeServer) -> None:
    api = Api(guarded)
    response = await api.get("/v1/models", headers={"Authorization": "Bearer nearly"})
    error = error_of(response, 401)
    assert error["type"] == "AuthenticationError"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "nearly" not in response.text
    assert not guarded.engine.submitted


async def test_an_empty_key_lets_nobody_in() -> None:
    """``--api-key "$UNSET"`` must not open the server."""
    server = FakeServer(ServerConfig(api_key=[""]))
    for headers in BAD_HEADERS:
        assert await status(server, "GET", "/v1/models", headers) == 401


async def test_without_keys_everything_is_open(server: FakeServer) -> None:
    assert await status(server, "GET", "/v1/models", []) == 200
    assert await status(server, "GET", "/v1/models", [(b"authorization", b"Bearer whatever")]) == 200


async def test_cors_only_if_wanted(server: FakeServer) -> None:
    headers = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    preflight = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    assert await status(server, "OPTIONS", "/v1/models", preflight) == 405
    assert "access-control-allow-origin" not in (await Api(server).get("/v1/models", headers=headers)).headers
    open_server = FakeServer(ServerConfig(allowed_origins=["http://page.example"], api_key=KEYS))
    assert await status(open_server, "OPTIONS", "/v1/models", preflight) == 200
    response = await Api(open_server).get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "http://page.example"
