"""The web page: chat and dashboard at ``/``, the API reference at ``/docs``.

Static files from ``api/web``, without a build step. The scripts use the public API like any other client, so the files
are not secret and need no key. Files are looked up in a table that is built at startup: no path from a request ever
reaches the file system.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.server.openapi import Operation

FOLDER = Path(__file__).parents[1] / "web"
VENDORED = "katex"
"""Subfolder with third-party files, unmodified, and their licence."""
CHAT_PAGE = "index.html"
DOCS_PAGE = "docs.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""Files with other endings are not served."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",  # nothing inline, nothing from other origins, not even images that a model links to
        "img-src 'self' blob:",  # blob: what the user attaches
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # with the next line: innerHTML and similar sinks throw
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # cached, but revalidated at each use: the files change with the server's version
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class WebFile:
    """A file in memory."""

    body: bytes
    content_type: str
    etag: str


class WebPages:
    """Handlers of the pages and their files."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Reads all files.

        Args:
            folder: Their location. Subfolders other than ``VENDORED`` are ignored.
        """
        self._files = {
            path.name: _read(path)
            for path in sorted((*folder.glob("*"), *folder.glob(f"{VENDORED}/*")))
            if path.suffix in CONTENT_TYPES and path.is_file()
        }

    @property
    def names(self) -> frozenset[str]:
        """Names of the files served under ``/web``."""
        return frozenset(self._files)

    def operations(self) -> tuple[Operation, ...]:
        """Rows of the route table. They are for browsers, so they are not in the OpenAPI document."""
        html, any_type = "text/html", "*/*"
        return (
            Operation("GET", "/", self.show_chat, "Chat and dashboard", media_type=html, is_open=True),
            Operation("GET", "/docs", self.show_docs, "Show the API reference", media_type=html, is_open=True),
            Operation("GET", "/web/{name}", self.show_file, "A file of the pages", media_type=any_type, is_open=True),
        )

    async def show_chat(self, request: Request) -> Response:
        """GET /."""
        return self._answer(request, CHAT_PAGE)

    async def show_docs(self, request: Request) -> Response:
        """GET /docs."""
        return self._answer(request, DOCS_PAGE)

    async def show_file(self, request: Request) -> Response:
        """GET /web/{name}."""
        return self._answer(request, request.path_params["name"])

    def _answer(self, request: Request, name: str) -> Response:
        file = self._files.get(name)
        if file is None:
            raise HTTPException(404)
        headers = {**HEADERS, "ETag": file.etag}
        if _matches(request.headers.getlist("if-none-match"), file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers={**headers, "Content-Type": file.content_type})


def _read(path: Path) -> WebFile:
    body = path.read_bytes()
    return WebFile(body, CONTENT_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _matches(conditions: list[str], etag: str) -> bool:
    """Whether a tag of If-None-Match matches the file. Weak tags match too, since compressing proxies weaken them."""
    tags = {tag.strip().removeprefix("W/") for condition in conditions for tag in condition.split(",")}
    return etag in tags or "*" in tags
