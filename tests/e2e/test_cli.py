"""Starting with something wrong: one line that says what, and the right exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.server import ROOT, Server, run_cli

pytestmark = pytest.mark.timeout(300)


def broken(source: Path, target: Path) -> Path:
    """A copy of a model to be damaged."""
    return Path(shutil.copytree(source, target / "model"))


def refused(model: Path, *flags: str, code: int = 78) -> str:
    """The one line that starting this model gives."""
    result = run_cli("serve", str(model), "--port", "0", *flags)
    lines = [line for line in result.stderr.splitlines() if line.startswith("octavo: ")]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and len(lines) == 1, result.stderr
    return lines[0]


def test_a_truncated_weight_file(tiny_model: Path, tmp_path: Path) -> None:
    model = broken(tiny_model, tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(model)
    assert str(file) in message and "truncated" in message


def test_a_missing_tensor(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = broken(tiny_model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    message = refused(model)
    assert "model.norm.weight" in message and "missing" in message


def test_a_truncated_gguf_file(demo_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    with demo_model.open("rb") as source:
        file.write_bytes(source.read(30_000_000))
    assert str(file) in refused(file)
    file.write_bytes(b"GGUF" + b"\xff" * 100)
    assert str(file) in refused(file)


def test_a_bad_configuration(tiny_model: Path, tmp_path: Path) -> None:
    model = broken(tiny_model, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Nonesuch"]}))
    assert "Nonesuch" in refused(model) and "docs/models.md lists all" in refused(model)
    (model / "config.json").write_text("{")
    assert "config.json" in refused(model)


def test_no_such_model() -> None:
    message = refused(Path("/nonexistent/model"))
    assert "/nonexistent/model" in message


def test_a_context_that_does_not_fit(tiny_model: Path) -> None:
    message = refused(tiny_model, "--kv-cache-memory", "64KiB")
    assert "--max-model-len" in message and "--kv-cache-memory" in message
    message = refused(tiny_model, "--max-model-len", "100000000")
    assert "--max-model-len 100000000" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-num-seqs", "0"], "--max-num-seqs: expected int >= 1"),
        (["--dtype", "int3"], "--dtype: invalid choice"),
        (["--nonesuch"], "unknown option --nonesuch"),
        (["--pipeline-parallel-size", "0"], "--pipeline-parallel-size: expected int >= 1"),
        (["--hf-overrides", "{"], "--hf-overrides"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["a", "--model", "b"], "two different models given"),
    ],
)
def test_bad_flags(flags: list[str], expected: str) -> None:
    result = run_cli("serve", *flags)
    assert result.returncode == 2
    assert expected in result.stderr and "Traceback" not in result.stderr


def test_a_port_in_use(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_cli("--model", str(tiny_model), "--port", str(port))
    assert result.returncode == 1
    assert f"127.0.0.1:{port}" in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def stuck_torch(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH, with a torch whose import leaves a file ``started`` and never ends."""
    folder = tmp_path / "stuck"
    folder.mkdir()
    (folder / "torch.py").write_text(
        "import pathlib, threading\npathlib.Path(__file__).with_name('started').touch()\nthreading.Event().wait()\n"
    )
    return folder


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--version"], 0),
        (["serve", "--help"], 0),
        (["--max-num-seqs", "0"], 2),
        (["--model", "/nonexistent/model"], 78),
        (["--host", "192.0.2.1"], 1),
        (["--ssl-keyfile", "/nonexistent.pem"], 2),
    ],
)
def test_a_failed_start_waits_for_no_import(tiny_model: Path, stuck_torch: Path, flags: list[str], code: int) -> None:
    """``run_cli`` returns when no process is left that could write to standard error."""
    model = [] if flags[0] in ("--version", "serve", "--model") else ["--model", str(tiny_model)]
    result = run_cli(*flags, *model, PYTHONPATH=str(stuck_torch))
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_server_killed_while_it_looks_for_its_model(stuck_torch: Path, number: int, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a hub that never answers
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(stuck_torch)}
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "--model", "org/model"],
            cwd=ROOT,
            env={**os.environ, **hub, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(stuck_torch)},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            silent.settimeout(60)
            with silent.accept()[0]:
                deadline = time.monotonic() + 60
                while not (stuck_torch / "started").exists():
                    assert time.monotonic() < deadline, "no worker was started early"
                    time.sleep(0.01)
                process.send_signal(number)
                _, errors = process.communicate(timeout=60)  # until no process is left that could write to it
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors


def test_flags_from_a_file_and_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {tiny_model}\nmax-model-len: 256\nserved_model_name: [a, b]\nkv-cache-memory: 16MiB\n")
    with Server("--config", str(file), "--max-model-len", "128", env={"VLLM_API_KEY": "key"}) as server:
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 401
        headers = {"Authorization": "Bearer key"}
        answer = server.post("/v1/completions", {"prompt": [5] * 200}, headers=headers)
        assert answer.status_code == 400 and "128 tokens" in answer.json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": "x", "model": "b"}, headers=headers).json()["model"] == "a"


def test_chat_and_complete_talk_to_a_server(demo_model: Path) -> None:
    with Server("--model", str(demo_model)) as server:
        url = f"{server.url}/v1"
        result = run_cli("chat", "--url", url, "--temperature", "0", "-q", "What is the capital of Japan?")
        assert result.returncode == 0 and "Tokyo" in result.stdout
        result = run_cli("complete", "--url", url, "--temperature", "0", "--max-tokens", "8", "-q", "One, two, three,")
        assert result.returncode == 0 and result.stdout.startswith("One, two, three,") and len(result.stdout) > 18
    result = run_cli("chat", "--url", url, "-q", "x")
    assert result.returncode == 1 and "no server at" in result.stderr
    assert run_cli("--version").stdout.strip().count(".") == 2
    assert "--max-model-len" in run_cli("serve", "--help").stdout


def test_a_batch_file(tiny_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": [5, 6, 7, i + 8], "max_tokens": 4, "temperature": 0} for i in range(20)]
    lines = [{"custom_id": f"id-{i}", "method": "POST", "url": "/v1/completions", "body": bodies[i]} for i in range(20)]
    lines.append({"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": []}})
    embed = {"custom_id": "vector", "method": "POST", "url": "/v1/embeddings", "body": {"input": [5, 6, 7]}}
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, embed]))
    result = run_cli(
        "run-batch", "-i", str(source), "-o", str(target), str(tiny_model), "--kv-cache-memory", "16MiB", timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "22 requests, 1 failed" in result.stderr
    answers = {answer["custom_id"]: answer for answer in map(json.loads, target.read_text().splitlines())}
    assert len(answers) == 22
    assert answers["vector"]["response"]["body"]["data"][0]["embedding"]
    for i in range(20):
        assert answers[f"id-{i}"]["response"]["body"]["usage"]["completion_tokens"] >= 1
    assert answers["bad"]["response"]["status_code"] == 400 and answers["bad"]["error"]["message"]
    missing = run_cli("run-batch", "-i", str(tmp_path / "none"), "-o", str(target), str(tiny_model))
    assert missing.returncode == 1 and "No such file" in missing.stderr
    assert run_cli("run-batch", "--model", str(tiny_model)).returncode == 2


def test_bench_serve_and_collect_env(tiny_model: Path) -> None:
    with Server("--model", str(tiny_model), "--kv-cache-memory", "16MiB") as server:
        flags = ["--num-prompts", "4", "--input-len", "8", "--output-len", "4", "--warmup", "1", "--token-ids"]
        result = run_cli("bench", "serve", "--base-url", server.url, "--vocab-size", "256", *flags)
        again = run_cli("bench", "serve", "--port", server.url.rpartition(":")[2], "--vocab-size", "256", *flags)
        assert again.returncode == 0, again.stderr
    assert result.returncode == 0, result.stderr
    assert "4 requests" in result.stdout and "TTFT (ms)" in result.stdout
    assert run_cli("bench").returncode == 2
    result = run_cli("collect-env", timeout=300, OCTAVO_API_KEY="hidden")
    assert result.returncode == 0, result.stderr
    for word in ("octavo:", "CPU capabilities:", "CPU kernels:", "torch built for:", "OCTAVO_API_KEY: (set)"):
        assert word in result.stdout
    assert "hidden" not in result.stdout and "error:" not in result.stdout
    overview = run_cli("--help").stdout
    assert all(command in overview for command in ("run-batch", "bench", "collect-env"))


def test_bench_without_a_server(tiny_model: Path, tmp_path: Path) -> None:
    flags = [str(tiny_model), "--distributed-executor-backend", "simulated", "--input-len", "8", "--output-len", "4"]
    figures = tmp_path / "figures.json"
    result = run_cli("bench", "throughput", *flags, "--num-prompts", "5", "--output-json", str(figures))
    assert result.returncode == 0, result.stderr
    assert "Throughput: " in result.stdout and json.loads(figures.read_text())["total_num_tokens"] == 60
    counts = ["--num-iters", "2", "--num-iters-warmup", "1", "--batch-size", "3", "--swap-space", "4"]
    result = run_cli("bench", "latency", *flags, *counts)
    assert result.returncode == 0, result.stderr
    assert "Avg latency: " in result.stdout and "--swap-space 4" in result.stderr
    result = run_cli("bench", "latency", str(tiny_model), "--kv-events-config", "{}")
    assert result.returncode == 2 and result.stderr.startswith("octavo: --kv-events-config {}: sharing")


def test_a_plan_says_what_fits_and_what_would(tiny_model: Path) -> None:
    flags = ("plan", str(tiny_model), "--dtype", "float32", "--max-num-seqs", "1", "--max-num-batched-tokens", "32")
    result = run_cli(*flags, "--kv-cache-memory", "1MiB", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["fits"] and figures["num_kv_tokens"] >= 512
    assert list(figures["decode_ms"]) == ["1"] and figures["decode_ms"]["1"] > 0
    bytes_of_one = int(figures["kv_bytes_per_token"] * 64)
    result = run_cli(*flags, "--kv-cache-memory", str(bytes_of_one))
    assert result.returncode == 3, result.stderr
    assert "does not fit: --max-model-len" in result.stdout and "would fit: --max-model-len auto" in result.stdout
