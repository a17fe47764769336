"""The files of the web page: how they are served, and what they must not contain."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from api.http.errors import EXCEPTION_HANDLERS
from api.server.web_routes import CONTENT_TYPES, FOLDER, WebPages

PAGES = sorted(FOLDER.glob("*.html"))
SCRIPTS = sorted(FOLDER.glob("*.js"))
STYLES = sorted(FOLDER.glob("*.css"))


def client(pages: WebPages) -> httpx.AsyncClient:
    routes = [Route(row.path, row.handler, methods=[row.method]) for row in pages.operations()]
    app = Starlette(routes=routes, exception_handlers=dict(EXCEPTION_HANDLERS))
    app.router.redirect_slashes = False
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


@pytest.fixture(scope="module")
def pages() -> WebPages:
    return WebPages()


@pytest.mark.parametrize(("path", "name"), [("/", "index.html"), ("/docs", "docs.html"), ("/web/base.css", "base.css")])
async def test_pages(pages: WebPages, path: str, name: str) -> None:
    async with client(pages) as http:
        response = await http.get(path)
        head = await http.head(path)
    assert response.status_code == 200
    assert response.content == (FOLDER / name).read_bytes()
    assert head.headers == response.headers and not head.content


async def test_every_file_has_its_type_and_the_headers_of_a_careful_site(pages: WebPages) -> None:
    async with client(pages) as http:
        for name in pages.names:
            response = await http.get(f"/web/{name}")
            assert response.status_code == 200
            assert response.headers["content-type"] == CONTENT_TYPES[Path(name).suffix]
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-content-type-options"] == "nosniff"
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy


@pytest.mark.parametrize("form", ["{0}", "W/{0}", '"other", {0}', '"other",W/{0}', "*"])
async def test_a_file_that_is_known_is_not_sent_again(pages: WebPages, form: str) -> None:
    async with client(pages) as http:
        etag = (await http.get("/web/app.js")).headers["etag"]
        again = await http.get("/web/app.js", headers={"If-None-Match": form.format(etag)})
        other = await http.get("/web/app.js", headers={"If-None-Match": '"other"'})
    assert again.status_code == 304 and not again.content
    assert again.headers["etag"] == etag and again.headers["cache-control"] == "no-cache"
    assert other.status_code == 200 and other.content


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/nothing.js",
        "/web/../app.py",
        "/web/..%2fapp.py",
        "/web/%2e%2e%2fapp.py",
        "/web/..%5capp.py",
        "/web//etc/passwd",
        "/web/%2fetc%2fpasswd",
        "/web/app.js%00",
        "/web/app.js/",
        "/web/APP.JS",
        "/web/secret.txt",
        "/web/folder/inner.js",
        "/docs/",
    ],
)
async def test_nothing_else_can_be_had(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "web"
    (folder / "folder").mkdir(parents=True)
    for name in ("index.html", "docs.html", "app.js", "secret.txt", "folder/inner.js"):
        (folder / name).write_text(name)
    (tmp_path / "app.py").write_text("secret")
    pages = WebPages(folder)
    assert pages.names == {"index.html", "docs.html", "app.js"}
    async with client(pages) as http:
        response = await http.get(httpx.URL("http://localhost").copy_with(raw_path=path.encode()))
    assert response.status_code == 404
    assert b"secret" not in response.content


async def test_files_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("before")
    pages = WebPages(tmp_path)
    (tmp_path / "index.html").write_text("after")
    async with client(pages) as http:
        assert (await http.get("/")).text == "before"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_keep_to_their_own_policy(page: Path, pages: WebPages) -> None:
    """Nothing inline, nothing from elsewhere, and only relative addresses: they hold under any path of a proxy."""
    text = page.read_text()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", text)
    for attributes, body in re.findall(r"<script([^>]*)>(.*?)</script>", text, re.S):
        assert "src=" in attributes and not body
    for address in re.findall(r'(?:href|src)="([^"]*)"', text):
        assert not re.match(r"/|[a-z]+:", address), address
        if address.startswith("web/"):
            assert address.removeprefix("web/").partition("#")[0] in pages.names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_never_parse_markup(script: Path, pages: WebPages) -> None:
    text = script.read_text()
    code = re.sub(r"^\s*(//|/?\*).*$", "", text, flags=re.M)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc", "eval("):
        assert word not in code
    assert "createContextualFragment" not in code and "setHTML" not in code
    for name in re.findall(r'from "\./([^"]+)"', code):
        assert name in pages.names
    assert not re.search(r"""["'`]/(v1|metrics|openapi|web)""", code), "an absolute address"
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("style", STYLES, ids=lambda path: path.name)
def test_styles_fetch_nothing(style: Path) -> None:
    text = style.read_text()
    assert "url(" not in text and "@import" not in text


def test_dark_colours_are_colours_of_the_light_table() -> None:
    """A colour that is only in one of the two would be missing in the other."""
    names = [set(re.findall(r"(--[a-z0-9-]+):", (FOLDER / name).read_text())) for name in ("base.css", "dark.css")]
    assert names[1] <= names[0]
    used = {name for style in STYLES for name in re.findall(r"var\((--[a-z0-9-]+)", style.read_text())}
    assert used <= names[0]


def test_what_is_vendored_is_as_it_was_published(pages: WebPages) -> None:
    """KaTeX 0.19.1, whose style sheet only lost the fonts in older formats and their folder."""
    folder = FOLDER / "katex"
    script = (folder / "katex.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() == "fa140498b8cfc8302cbe5e7cb1bdbc1f952bc38b3fa258ede09e73edbf9a74bc"
    assert b"innerHTML" not in script and b"insertAdjacentHTML" not in script
    assert "The MIT License" in (folder / "LICENSE").read_text()
    fonts = re.findall(r"url\(([^)]*)\)", (folder / "katex.min.css").read_text())
    assert set(fonts) == {path.name for path in folder.glob("*.woff2")} <= pages.names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000


def test_icons_exist() -> None:
    sprite = set(re.findall(r"^  ([a-z]+): \[", (FOLDER / "icons.js").read_text(), re.M))
    used = {name for page in PAGES for name in re.findall(r'data-icon="([a-z]+)"', page.read_text())}
    assert len(used) > 10
    for script in SCRIPTS:
        text = script.read_text()
        used.update(re.findall(r'\b(?:icon|iconButton)\(\s*"([a-z]+)"', text))
    assert used <= sprite
