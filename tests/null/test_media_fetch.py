"""Images from URLs: only where the operator allows it, within limits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from api.media import fetch
from api.media.fetch import FetchError, MediaAccess


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name.startswith("to:"):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("to:"))
            self.end_headers()
        elif name == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif name == "missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * int(name or 0))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


NAMED = MediaAccess(("127.0.0.1",))


def test_a_host_that_is_named(port: int) -> None:
    assert NAMED.fetch(f"http://127.0.0.1:{port}/5") == b"xxxxx"
    assert NAMED.fetch(f"http://127.0.0.1:{port}/to:/3") == b"xxx"


@pytest.mark.parametrize(
    ("access", "path", "message"),
    [
        (MediaAccess(), "5", "not among --allowed-media-domains"),
        (NAMED, "to:http://[", "no valid URL"),
        (MediaAccess(("example.com",)), "5", "not among --allowed-media-domains"),
        (MediaAccess(("*",)), "5", "has no public address"),
        (NAMED, "missing", "answers with status 404"),
        (NAMED, "loop", "redirected more than 3 times"),
        (NAMED, "to:http://localhost/", "localhost is not among"),
        (NAMED, "to:file:///etc/passwd", "must begin with"),
        (NAMED, "2000", "larger than"),
    ],
)
def test_refusals(port: int, access: MediaAccess, path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    with pytest.raises(FetchError, match=message):
        access.fetch(f"http://127.0.0.1:{port}/{path}")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a", "http://", "http://127.0.0.1:1/a", "http://[", "javascript:1"])
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(FetchError):
        NAMED.fetch(url)


def test_files(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "a b.png").write_bytes(b"image")
    (outside / "secret").write_bytes(b"secret")
    (inside / "link").symlink_to(outside / "secret")
    access = MediaAccess(folder=str(inside))
    assert access.fetch(f"file://{inside}/a%20b.png") == b"image"
    for name in ("link", "../out/secret", "%2e%2e/out/secret"):
        with pytest.raises(FetchError, match="not in the folder"):
            access.fetch(f"file://{inside}/{name}")
    for name in ("nothing", ""):
        with pytest.raises(FetchError):
            access.fetch(f"file://{inside}/{name}")
    with pytest.raises(FetchError, match="--allowed-local-media-path"):
        NAMED.fetch(f"file://{inside}/a%20b.png")
