"""From a name to local files: what is downloaded, in which order, and what is refused before."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from api.cli import resolve
from api.config import DEMO_GENERATION, DEMO_MODULE, ServerConfig, make_config
from api.errors import ModelFileError
from api.model.files import ModelFiles, find_model, with_model
from api.model.hub import open_hub
from api.params.defaults import check_defaults, default_params
from api.params.sampling import SamplingParams
from executor.conversion import convert
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "89abcdef0123456789abcdef0123456789abcdef"
WEIGHTS = "model.safetensors"


class Found(NamedTuple):
    """The outcome of ``find_model``."""

    path: str
    """Empty if the model was refused."""
    errors: str
    """What was written to standard error."""


class Finder:
    """``find_model`` in a process of its own: ``huggingface_hub`` reads its endpoint when it is imported.

    One process serves all tests, since imports would take most of the time.
    """

    CODE = """
import contextlib, io, json, os, sys
from api.cli import resolve, serve_parser
from api.model.files import find_model
from engine_core.launch import setup_logging

for line in sys.stdin:
    os.environ["OCTAVO_CACHE_DIR"], *flags = json.loads(line)
    found, errors = "", io.StringIO()
    with contextlib.redirect_stderr(errors):
        setup_logging("api", "info")
        try:
            files = find_model(resolve(serve_parser().parse(flags), {})[0])
            found = str(files.weights or files.path)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    print(json.dumps([found, errors.getvalue()]), flush=True)
"""

    def __init__(self, endpoint: str, *, offline: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            cwd=ROOT,
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HUB_OFFLINE": str(int(offline)),
                "HF_HUB_DISABLE_XET": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def find(self, cache: Path, *flags: str) -> Found:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = json.dumps([str(cache / "octavo"), "--download-dir", str(cache), *flags])
        print(line, file=self._process.stdin, flush=True)
        return Found(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


class Hub:
    """What ``huggingface_hub`` asks of the hub, with one model on it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sent: list[str] = []
        """Files whose content was asked for."""
        self.pull_request: dict[str, bytes] | None = None
        """Files of pull request 1, by the hub's conversion bot."""
        self.author = ""
        self.main_commits: list[str] = []
        """History of the main branch, newest first."""
        self.gguf: dict[str, Any] | None = None
        """What the hub read from the repository's GGUF files."""
        self._finders: dict[bool, Finder] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                is_converted = "refs/pr/1" in path or CONVERTED in path
                files, commit = (hub.pull_request or {}, CONVERTED) if is_converted else (hub.files, COMMIT)
                if path.startswith("/api/models/org/model/tree/"):
                    listed = [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ]
                    self.reply(200, listed, with_body)
                elif path.startswith("/api/models/org/model/discussions"):
                    self.reply(200, hub.discussions(), with_body)
                elif path.startswith("/api/models/org/model/commits/"):
                    history = [CONVERTED, COMMIT] if is_converted else hub.main_commits
                    date = "2024-01-01T00:00:00.000Z"
                    listed = [{"id": each, "title": "", "message": "", "date": date, "authors": []} for each in history]
                    self.reply(200, listed, with_body)
                elif path.startswith("/api/models/org/model"):
                    listed = [{"rfilename": name} for name in files]
                    body = {"id": "org/model", "sha": commit, "siblings": listed, "private": False, "tags": []}
                    self.reply(200, {**body, "gguf": hub.gguf}, with_body)
                elif path.startswith("/org/model/resolve/"):
                    name = path.removeprefix("/org/model/resolve/").replace("refs/pr/1", CONVERTED).split("/", 1)[1]
                    content = files.get(name)
                    if content is None:
                        self.reply(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
                        return
                    if with_body:
                        hub.sent.append(name)
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self.reply(200, content, with_body, {"ETag": etag, "X-Repo-Commit": commit})
                else:
                    self.reply(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

            def reply(self, status: int, body: Any, with_body: bool, headers: dict[str, str] | None = None) -> None:
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for key, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def discussions(self) -> dict[str, Any]:
        found = []
        if self.pull_request is not None:
            title = "Adding `safetensors` variant of this model"
            found.append(
                {"title": title, "num": 1, "status": "open", "author": {"name": self.author}, "isPullRequest": True,
                 "createdAt": "2024-01-01T00:00:00.000Z", "repo": {"name": "org/model", "type": "model"}}
            )  # fmt: skip
        return {"discussions": found, "count": len(found), "start": 0}

    def reset(self, files: dict[str, bytes]) -> None:
        """Another model, and nothing known about it."""
        self.files, self.sent, self.pull_request, self.gguf = files, [], None, None
        self.author, self.main_commits = "SFconvertbot", [COMMIT]

    def find(self, cache: Path, *flags: str, model: str = "org/model", offline: bool = False) -> Found:
        if offline not in self._finders:
            self._finders[offline] = Finder(self.url, offline=offline)
        return self._finders[offline].find(cache, "--model", model, *flags)

    def close(self) -> None:
        for finder in self._finders.values():
            finder.close()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(running_hub: Hub) -> Hub:
    folder = tiny.checkpoint("llama")
    running_hub.reset({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".gguf"})
    return running_hub


def test_the_hubs_package_has_no_log_of_its_own() -> None:
    open_hub("a/b", ServerConfig(), None)
    assert "huggingface_hub.utils.logging" in sys.modules and not logging.getLogger("huggingface_hub").handlers


def edit_config(hub: Hub, **fields: Any) -> None:
    hub.files["config.json"] = json.dumps({**json.loads(hub.files["config.json"]), **fields}).encode()


def test_a_model_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    result = hub.find(tmp_path)
    assert result.path, result.errors
    assert (Path(result.path) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.sent[0] == "config.json"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture 'MambaForCausalLM' is not supported yet, nor can it run through transformers: it keeps a "
            "recurrent state, not only keys and values; choose a model of another one (",
        ),
        ({"architectures": None}, "architectures must be a list"),
        ({"quantization_config": {"quant_method": "hqq"}}, "weights quantised with 'hqq' are not supported yet"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "version 'gemv' is not supported"),
    ],
)
def test_what_cannot_be_served_is_not_downloaded(
    hub: Hub, tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    edit_config(hub, **fields)
    result = hub.find(tmp_path)
    assert result.errors.startswith("ModelFileError: org/model: config.json: ") and expected in result.errors
    assert hub.sent == ["config.json"]


def test_overrides_count(hub: Hub, tmp_path: Path) -> None:
    edit_config(hub, architectures=["Renamed"])
    override = json.dumps({"architectures": ["LlamaForCausalLM"]})
    result = hub.find(tmp_path, "--hf-overrides", override, "--load-format", "dummy")
    assert result.path, result.errors
    assert WEIGHTS not in hub.sent, "random weights need no file"


@pytest.mark.parametrize(
    ("other", "flags", "expected"),
    [
        ("consolidated.00.pth", (), "org/model: no *.safetensors file (consolidated.00.pth may execute code"),
        ("pytorch_model.bin", ("--load-format", "safetensors"), "--load-format auto converts it"),
        ("model-Q4_K_M.gguf", ("--load-format", "safetensors"), "--load-format gguf takes one of Q4_K_M"),
        ("weights.msgpack", (), "org/model: no *.safetensors file"),
    ],
)
def test_other_formats_are_not_downloaded(
    hub: Hub, tmp_path: Path, other: str, flags: tuple[str, ...], expected: str
) -> None:
    hub.files[other] = hub.files.pop(WEIGHTS)
    result = hub.find(tmp_path, *flags)
    assert expected in result.errors
    assert hub.sent == ["config.json"]


def test_a_repository_that_is_no_model(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"README.md": b"#"}
    assert "org/model: no config.json and no GGUF file" in hub.find(tmp_path).errors
    assert hub.sent == []


# ---------------------------------------------------------------------------------------------------------
# GGUF files of a repository


@pytest.fixture
def gguf_hub(hub: Hub) -> Hub:
    """A repository of GGUF files alone, one of them split."""
    content = tiny.gguf_file(tiny.checkpoint("llama"), GGMLQuantizationType.Q8_0).path.read_bytes()
    hub.files = {f"model-{label}.gguf": content for label in ("Q4_K_M", "Q8_0", "UD-Q6_K")}
    parts = tiny.split_gguf(tiny.checkpoint("llama"), 3)
    hub.files |= {f"BF16/model-BF16-{path.name[-19:]}": path.read_bytes() for path in parts}
    hub.files |= {"mmproj-BF16.gguf": b"", "README.md": b""}
    return hub


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/model", "model-Q4_K_M.gguf"),
        ("hf.co/org/model:q8_0", "model-Q8_0.gguf"),
    ],
)
def test_a_file_of_a_gguf_repository(gguf_hub: Hub, tmp_path: Path, model: str, expected: str) -> None:
    result = gguf_hub.find(tmp_path, model=model)
    assert result.path, result.errors
    assert Path(result.path).name == expected
    assert gguf_hub.sent == [expected]
    again = gguf_hub.find(tmp_path, model=model, offline=True)
    assert again.path == result.path, f"{again.errors}: without a connection, the files on this machine count"


def test_all_parts_of_a_split_model(gguf_hub: Hub, tmp_path: Path) -> None:
    result = gguf_hub.find(tmp_path, model="org/model:bf16")
    assert result.path, result.errors
    assert result.path.endswith("BF16/model-BF16-00001-of-00003.gguf")
    assert sorted(gguf_hub.sent) == [f"BF16/model-BF16-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/model:Q5_K_M", "no GGUF file for 'Q5_K_M'; it has BF16, Q4_K_M, Q8_0, UD-Q6_K; write org/model:NAME"),
        ("org/other:Q5_K_M", "org/other: no GGUF files are known"),
    ],
)
def test_a_quantisation_that_is_not_there(gguf_hub: Hub, tmp_path: Path, model: str, expected: str) -> None:
    assert expected in gguf_hub.find(tmp_path, model=model).errors
    assert gguf_hub.sent == []


def test_the_hub_knows_the_architecture_of_gguf_files(gguf_hub: Hub, tmp_path: Path) -> None:
    gguf_hub.gguf = {"architecture": "mamba"}
    assert "architecture 'mamba' is not supported yet" in gguf_hub.find(tmp_path).errors
    assert gguf_hub.sent == []


# ---------------------------------------------------------------------------------------------------------
# pickled weights


@pytest.fixture
def pickled_hub(hub: Hub, tmp_path: Path) -> Hub:
    """A repository with pickled weights alone."""
    file = tmp_path / "pickle"
    torch.save(load_file(tiny.checkpoint("llama") / WEIGHTS), file)
    del hub.files[WEIGHTS]
    hub.files |= {
        "pytorch_model.bin": file.read_bytes(),
        "training_args.bin": b"",
        "config.json": hub.files["config.json"],
    }
    return hub


def test_the_conversion_that_the_hub_offers(pickled_hub: Hub, tmp_path: Path) -> None:
    weights = (tiny.checkpoint("llama") / WEIGHTS).read_bytes()
    pickled_hub.pull_request = {**pickled_hub.files, WEIGHTS: weights}
    result = pickled_hub.find(tmp_path)
    assert result.path, result.errors
    folder = Path(result.path)
    assert folder.name == CONVERTED and (folder / WEIGHTS).read_bytes() == weights
    assert "using the conversion that the hub offers" in result.errors
    assert not [name for name in pickled_hub.sent if name.endswith(".bin")]
    again = pickled_hub.find(tmp_path, offline=True)
    assert again.path == result.path, again.errors


@pytest.mark.parametrize(("author", "commits"), [("somebody", [COMMIT]), ("SFconvertbot", ["f" * 40, COMMIT])])
def test_other_pull_requests_do_not_count(pickled_hub: Hub, tmp_path: Path, author: str, commits: list[str]) -> None:
    """Anyone may open one, and the main branch may have changed since."""
    pickled_hub.pull_request = {**pickled_hub.files, WEIGHTS: b"not the model"}
    pickled_hub.author, pickled_hub.main_commits = author, commits
    result = pickled_hub.find(tmp_path)
    assert result.path, result.errors
    assert WEIGHTS not in pickled_hub.sent


def test_pickled_weights_are_converted_once(pickled_hub: Hub, tmp_path: Path) -> None:
    result = pickled_hub.find(tmp_path)
    assert result.path, result.errors
    folder = Path(result.path)
    assert folder.is_relative_to(tmp_path / "octavo" / "converted")
    expected = load_file(tiny.checkpoint("llama") / WEIGHTS)
    found = load_file(folder / WEIGHTS)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert "training_args.bin" not in pickled_hub.sent
    assert result.errors.count("converting 0.00 GB of pickled weights to safetensors, once, in ") == 1
    again = pickled_hub.find(tmp_path)
    assert again.path == result.path and "converting" not in again.errors


# ---------------------------------------------------------------------------------------------------------
# local files


def find(model: Path | str = "", **options: Any) -> ModelFiles:
    files = find_model(resolve({"model": str(model), **options}, {})[0])
    check_defaults(files)
    assert files.tokenizer is not None
    return files


def refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(ModelFileError) as caught:
        find(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_device_is_named_before_anything_is_looked_for() -> None:
    assert refusal("no/such/folder", device="tpu") == "--device: unknown device 'tpu'; choose from auto, cuda, cpu"


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./nope", "a\0b", "~nobody-has-this-name/x", "x" * 5000, "/dev/null"]
)
def test_names_that_lead_nowhere(name: str) -> None:
    assert refusal(name)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.json",
     "tokenizer.json", "additional_chat_templates/x.jinja"],
)  # fmt: skip
def test_a_pipe_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    """Opening it would wait for a writer, for ever."""
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    for template in folder.glob("chat_template*"):
        template.unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "generation_config.json":
        refusal(folder, generation_config=str(folder))
    else:
        assert str(folder) in refusal(folder)


def test_a_pipe_as_the_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    assert refusal(tmp_path / "model.gguf").endswith("a model must be a folder or a .gguf file")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "model.gguf")
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ('{"temperature": NaN}', "NaN is not allowed"),
        ('{"temperature": "hot"}', "temperature"),
        ('{"temperature": 1e999}', "temperature"),
        ('{"top_p": 7}', "top_p must be in (0, 1]"),
        ('{"max_new_tokens": 0}', "max_tokens must be at least 1"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not a JSON object"),
    ],
)
def test_a_generation_config_that_no_request_could_use(tmp_path: Path, fields: str, expected: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(fields)
    message = refusal(folder)
    assert message.startswith(str(folder / "generation_config.json")) and expected in message
    if expected in ("temperature", "top_p must be in (0, 1]"):
        find(folder, generation_config="vllm", override_generation_config={"temperature": 0.5})


def test_the_demo_model_has_defaults_of_its_own() -> None:
    if importlib.util.find_spec(DEMO_MODULE) is None:
        pytest.skip("the demo model is not installed")
    params = SamplingParams(**default_params(find().generation_config))
    assert (
        (params.temperature, params.top_p) == (DEMO_GENERATION["temperature"], DEMO_GENERATION["top_p"]) == (0.2, 0.9)
    )
    assert find(generation_config="vllm").generation_config == {}
    changed = find(override_generation_config={"temperature": 0.7}).generation_config
    assert changed == {"temperature": 0.7, "top_p": 0.9}


# ---------------------------------------------------------------------------------------------------------
# pickled weights in a local folder


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose weights are a pickle, and a cache of its own."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_folder_of_pickled_weights(pickled: Path) -> None:
    """In shards, in the format before torch 1.6, with tensors that share memory."""
    tensors = load_file(tiny.checkpoint("llama") / WEIGHTS)
    expected = dict(tensors)
    tensors["lm_head.weight"] = expected["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (pickled / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for is_new, (file, chosen) in enumerate(shards.items()):
        state = {name: tensors[name] for name in chosen}
        torch.save(state, pickled / file, _use_new_zipfile_serialization=bool(is_new))
    weight_map = {name: file for file, chosen in shards.items() for name in chosen}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (pickled / "pytorch_model-left-over.bin").write_bytes(b"")
    found = find(pickled)
    assert found.weights is not None and found.path == pickled
    converted = {}
    for path in sorted(found.weights.glob("*.safetensors")):
        converted.update(load_file(path))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())
    index = json.loads((found.weights / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == names
    (pickled / "pytorch_model-00001-of-00002.bin").touch()
    assert find(pickled).weights != found.weights, "a file has changed"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as tensors only: "),
        (b"PK\x03\x04 not a zip file", "cannot be read as tensors only: "),
        ([torch.ones(2)], "does not hold named tensors"),
        ({"model": {"weight": torch.ones(2)}}, "'model' is not a tensor: expected the state dict of a model"),
    ],
)
def test_pickled_files_that_hold_no_model(tmp_path: Path, content: Any, expected: str) -> None:
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=re.escape(expected)):
        convert(json.dumps({"source": str(file), "target": str(tmp_path / WEIGHTS)}).encode())
    assert not (tmp_path / WEIGHTS).exists()


def test_a_pickle_that_runs_code_does_not(pickled: Path) -> None:
    target = pickled.parent / "made-by-the-pickle"
    file = pickled / "pytorch_model.bin"
    torch.save({"weight": Hostile(target)}, file)
    expected = f"{file}: cannot be converted to safetensors: cannot be read as tensors only: UnpicklingError"
    assert refusal(pickled).startswith(expected)
    assert not target.exists()
    assert list((pickled.parent / "cache" / "converted").iterdir()) == [], "nothing half converted stays"


def test_pickled_weights_are_opened_by_nothing_else(pickled: Path) -> None:
    assert find(pickled, load_format="dummy").weights is None
    assert find(pickled, distributed_executor_backend="simulated").weights is None
    assert find(pickled, load_format="safetensors").weights is None
    (pickled / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../x.bin"}}')
    assert "not an index of weights: files must lie beside it" in refusal(pickled)
    (pickled / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "x.bin"}}')
    assert "x.bin: missing, although pytorch_model.bin.index.json lists it" in refusal(pickled)


# ---------------------------------------------------------------------------------------------------------
# ModelScope


def test_modelscope_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert refusal("org/model", use_modelscope=True).endswith("pip install modelscope")


def test_a_model_from_modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    folder = tiny.checkpoint("llama")

    class HubApi:
        def get_model_files(self, model: str, revision: str | None, recursive: bool) -> list[dict[str, str]]:
            return [{"Path": path.name, "Type": "blob"} for path in folder.iterdir()] + [{"Path": "x", "Type": "tree"}]

    def model_file_download(model: str, file: str, revision: str | None, cache_dir: str | None) -> str:
        asked.append((model, file, revision))
        return str(folder / file)

    def snapshot_download(model: str, **options: Any) -> str:
        asked.append((model, options))
        return str(folder)

    modules: dict[str, dict[str, Any]] = {
        "modelscope": {},
        "modelscope.hub": {},
        "modelscope.hub.api": {"HubApi": HubApi},
        "modelscope.hub.file_download": {"model_file_download": model_file_download},
        "modelscope.hub.snapshot_download": {"snapshot_download": snapshot_download},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    config = resolve({"model": "org/model", "revision": "v1"}, {"VLLM_USE_MODELSCOPE": "True"})[0]
    assert find_model(config).path == folder
    (first, (model, options)) = asked
    assert first == ("org/model", "config.json", "v1") and model == "org/model"
    assert options["revision"] == "v1" and "*.safetensors" in options["allow_file_pattern"]


def test_a_draft_model_needs_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    folder = tiny.checkpoint("llama")
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = sorted(vocabulary, key=vocabulary.__getitem__)[30:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))

    def configured(draft: Path) -> Any:
        config, _ = make_config({"model": str(folder), "dtype": "float32", "speculative_config": {"model": str(draft)}})
        return with_model(config, find_model(config)).engine.executor.speculative

    own = configured(folder)
    assert own.draft.model == str(folder.resolve()) and own.draft.dtype == "float32"
    with pytest.raises(ModelFileError, match=r"model: token 30 of .*other is .* with the same vocabulary"):
        configured(other)
    with pytest.raises(ModelFileError, match="missing: no such folder or file"):
        configured(tmp_path / "missing")


def test_a_draft_head_has_no_tokenizer(tmp_path: Path) -> None:
    folder, head = tiny.checkpoint("llama"), tmp_path / "head"
    head.mkdir()

    def configured(path: Path) -> Any:
        speculative = {"method": "eagle3", "model": str(path)}
        config, _ = make_config({"model": str(folder), "dtype": "float32", "speculative_config": speculative})
        return with_model(config, find_model(config)).engine.executor.speculative

    with pytest.raises(ModelFileError, match="a draft head must be a folder with a config.json"):
        configured(head)
    (head / "config.json").write_text("{}")
    own = configured(head)
    assert own.method == "eagle3" and (own.draft.model, own.draft.dtype) == (str(head.resolve()), "float32")
    with pytest.raises(ModelFileError, match="missing: no such folder or file"):
        configured(tmp_path / "missing")
