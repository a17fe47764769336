"""From a name to local files: what is downloaded, in which order, and what is refused before."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from api.cli import resolve
from api.config import DEMO_GENERATION, DEMO_MODULE
from api.errors import ModelFileError
from api.model.files import ModelFiles, find_model
from api.params.defaults import check_defaults, default_params
from api.params.sampling import SamplingParams
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Hub:
    """What ``huggingface_hub`` asks of the hub, with one model on it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sent: list[str] = []
        """Files whose content was asked for."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                if path.startswith("/api/models/org/model/tree/"):
                    listed = [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in hub.files.items()
                    ]
                    self.reply(200, json.dumps(listed).encode(), with_body)
                elif path.startswith("/api/models/org/model"):
                    listed = [{"rfilename": name} for name in hub.files]
                    body = {"id": "org/model", "sha": COMMIT, "siblings": listed, "private": False, "tags": []}
                    self.reply(200, json.dumps(body).encode(), with_body)
                elif path.startswith("/org/model/resolve/"):
                    name = path.split("/", 5)[5]
                    content = hub.files.get(name)
                    if content is None:
                        self.reply(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
                        return
                    if with_body:
                        hub.sent.append(name)
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self.reply(200, content, with_body, {"ETag": etag})
                else:
                    self.reply(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

            def reply(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def find(self, cache: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        """``find_model`` in a process of its own: the package reads its endpoint when it is imported."""
        code = (
            "import sys; from api.cli import resolve, serve_parser; from api.model.files import find_model\n"
            "given = serve_parser().parse(sys.argv[1:])\n"
            "try: print(find_model(resolve(given, {})[0]).path)\n"
            "except Exception as error: sys.exit(f'{type(error).__name__}: {error}')"
        )
        environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, "--model", "org/model", *flags],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def hub() -> Iterator[Hub]:
    folder = tiny.checkpoint("llama")
    hub = Hub({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".gguf"})
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def edit_config(hub: Hub, **fields: Any) -> None:
    hub.files["config.json"] = json.dumps({**json.loads(hub.files["config.json"]), **fields}).encode()


def test_a_model_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    result = hub.find(tmp_path)
    assert result.returncode == 0, result.stderr
    assert (Path(result.stdout.strip()) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.sent[0] == "config.json"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture 'MambaForCausalLM' is not supported yet; choose a model with one of: ",
        ),
        ({"architectures": None}, "architectures must be a list"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantised with 'awq' are not supported yet"),
    ],
)
def test_what_cannot_be_served_is_not_downloaded(
    hub: Hub, tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    edit_config(hub, **fields)
    result = hub.find(tmp_path)
    assert result.stderr.startswith("ModelFileError: org/model: config.json: ") and expected in result.stderr
    assert hub.sent == ["config.json"]


def test_overrides_count(hub: Hub, tmp_path: Path) -> None:
    edit_config(hub, architectures=["Renamed"])
    override = json.dumps({"architectures": ["LlamaForCausalLM"]})
    result = hub.find(tmp_path, "--hf-overrides", override, "--load-format", "dummy")
    assert result.returncode == 0, result.stderr
    assert WEIGHTS not in hub.sent, "random weights need no file"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("pytorch_model.bin", "org/model: no safetensors weights (pytorch_model.bin may execute code when loaded"),
        ("model-Q4_K_M.gguf", "download one and pass its path (model-Q4_K_M.gguf)"),
    ],
)
def test_other_formats_are_not_downloaded(hub: Hub, tmp_path: Path, other: str, expected: str) -> None:
    hub.files[other] = hub.files.pop(WEIGHTS)
    result = hub.find(tmp_path)
    assert expected in result.stderr
    assert hub.sent == ["config.json"]


def test_a_model_without_configuration(hub: Hub, tmp_path: Path) -> None:
    del hub.files["config.json"]
    hub.files["model.gguf"] = b"GGUF"
    result = hub.find(tmp_path)
    assert "org/model: no config.json; it has GGUF files: download one" in result.stderr
    assert hub.sent == []


# ---------------------------------------------------------------------------------------------------------
# local files


def find(model: Path | str = "", **options: Any) -> ModelFiles:
    files = find_model(resolve({"model": str(model), **options}, {})[0])
    check_defaults(files)
    return files


def refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(ModelFileError) as caught:
        find(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_device_is_named_before_anything_is_looked_for() -> None:
    assert refusal("no/such/folder", device="cuda") == "--device: unknown device 'cuda'; choose from auto, cpu"


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./nope", "a\0b", "~nobody-has-this-name/x", "x" * 5000, "/dev/null"]
)
def test_names_that_lead_nowhere(name: str) -> None:
    assert refusal(name)


@pytest.mark.timeout(20)
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
