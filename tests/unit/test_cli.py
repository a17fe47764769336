"""Commands and what is said about mistakes, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from api import cli
from api.config import ServerConfig, make_config
from api.errors import ModelFileError
from api.model.files import find_model
from api.server.run import PortInUseError, open_listener
from tests.fakes import FakeServer
from tests.unit.conftest import Api


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"octavo {name}" in overview or name == "serve" for name in cli.COMMANDS)
    assert max(map(len, overview.splitlines())) <= 100
    assert cli.main(["--version"]) == 0
    assert cli.main(["chta"]) == 2
    assert "unknown command 'chta'; did you mean chat?" in capsys.readouterr().err
    assert cli.main(["SmolLM2"]) == 2
    assert "unknown command 'SmolLM2' (" in capsys.readouterr().err
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as end:
            raise SystemExit(cli.main([name, "--help"]))
        assert end.value.code == 0
        assert "usage: octavo " in capsys.readouterr().out


@pytest.mark.parametrize("word", ["org/name", "./folder", "model.gguf", "/nonexistent", "here"])
def test_what_may_be_a_model_is_served(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    served: list[list[str]] = []

    def serve(arguments: Sequence[str]) -> int:
        served.append(list(arguments))
        return 0

    monkeypatch.setattr(cli, "serve", serve)
    assert cli.main([word, "--port", "1"]) == 0 and served == [[word, "--port", "1"]]


@pytest.mark.parametrize(
    "name", ["./nope", "/nonexistent/nope", "~/nonexistent-nope", "nope", "some/where/nope", "a/nope.gguf"]
)
def test_a_model_that_is_not_there(name: str) -> None:
    config, _ = make_config({"model": name})
    with pytest.raises(ModelFileError, match="no such folder or file"):
        find_model(config)


def test_addresses_that_are_not_ours() -> None:
    with pytest.raises(PortInUseError, match=r"--host 192.0.2.1 is not an address of this machine; use 127") as error:
        open_listener(ServerConfig(host="192.0.2.1", port=0))
    assert "--port" not in str(error.value)
    with pytest.raises(PortInUseError, match=r"cannot resolve --host no.such.host.invalid"):
        open_listener(ServerConfig(host="no.such.host.invalid", port=0))


async def test_paths_with_and_without_the_prefix() -> None:
    api = Api(FakeServer(ServerConfig(root_path="/llm", enable_request_id_headers=True)))
    for path in ("/v1/models", "/llm/v1/models", "/health", "/llm/health", "/llm/", "/llm/v1/models/fake-model"):
        assert (await api.get(path)).status_code == 200, path
    for path in ("/llm/llm/v1/models", "/llmv1/models", "/other/v1/models"):
        assert (await api.get(path)).status_code == 404, path
    for path in ("/v1/completions", "/llm/v1/completions"):
        assert (await api.ok(path, {"prompt": "x", "max_tokens": 2}))["choices"][0]["text"] == "xx"
    text = (await api.get("/metrics")).text
    assert text.count('handler="/v1/completions"') and "/llm" not in text


async def test_seeds_of_requests_without_one() -> None:
    async def seeds(seed: int | None) -> list[int]:
        api = Api(FakeServer(ServerConfig(seed=seed)))
        await api.complete(["a", "b"])
        await api.complete("c", n=2)
        await api.complete("d", seed=5)
        return [request.sampling_params.seed for request in api.server.engine.submitted if request.sampling_params]

    first = await seeds(0)
    assert first == await seeds(0) and len(set(first)) == 5 and first[-1] == 5
    assert first[:-1] != (await seeds(1))[:-1] and (await seeds(None))[:-1] != (await seeds(None))[:-1]
