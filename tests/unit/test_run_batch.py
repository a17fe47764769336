"""Batch files through the application, over a fake engine."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from api.commands.run_batch import BatchError, InOrder, _opened, answer_lines
from api.config import ServerConfig
from tests.fakes import FakeServer, says

HI = [{"role": "user", "content": "hi"}]


async def run(lines: list[Any], server: FakeServer | None = None, max_line: int = 1 << 20) -> list[Any]:
    """The answers, in the order of the lines where that is possible."""
    server = server or FakeServer(script=says("answer"))
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    output = io.BytesIO()
    counts = await answer_lines(server.app, io.BytesIO(data), output, 4, max_line)
    results = [json.loads(line) for line in output.getvalue().splitlines()]
    assert counts.done == len(results) and counts.failed == sum(result["error"] is not None for result in results)
    assert server.engine.num_unfinished == 0 and server.traffic.num_open == 0
    return results


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body or {"messages": HI}}


async def test_chats_and_completions_are_answered() -> None:
    lines = [line(f"chat-{i}", messages=HI) for i in range(10)]
    lines += [line("text", "/v1/completions", prompt=["a", "b"], n=2, seed=1), line("t", "/tokenize", prompt="x")]
    results = {result["custom_id"]: result for result in await run([*lines, b"", b"  "])}
    assert len(results) == 12
    assert all(result["response"]["status_code"] == 200 and result["error"] is None for result in results.values())
    body = results["chat-3"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "answer" and body["object"] == "chat.completion"
    assert body["id"].endswith(results["chat-3"]["response"]["request_id"])
    assert len(results["text"]["response"]["body"]["choices"]) == 4
    assert results["t"]["response"]["body"]["count"] == 2
    assert len({result["id"] for result in results.values()}) == 12


async def test_a_bad_line_fails_alone() -> None:
    results = await run(
        [
            line("good"),
            line("bad", messages=HI, temperature=9),
            line("model", messages=HI, model="none"),
            line("url", "/v1/nothing"),
            line("get", "/health"),
            line("stream", messages=HI, stream=True),
            line("good"),
            {**line("method"), "method": "GET"},
            {"custom_id": "short"},
            b"{",
            b"\xff",
            b"[" * 100_000,
            line("long", messages=[{"role": "user", "content": "x" * 5000}]),
        ],
        max_line=4000,
    )
    by_id: dict[Any, list[Any]] = {}
    for result in results:
        by_id.setdefault(result["custom_id"], []).append(result)
    good, again = sorted(by_id["good"], key=lambda result: result["error"] is not None)
    assert good["error"] is None
    assert again["response"] is None and "earlier line" in again["error"]["message"]
    status = {name: by_id[name][0]["response"]["status_code"] for name in ("bad", "model", "url", "get")}
    assert status == {"bad": 400, "model": 404, "url": 404, "get": 405}
    assert "temperature" in by_id["bad"][0]["error"]["message"]
    assert by_id["bad"][0]["response"]["body"]["error"]["param"] == "temperature"
    assert "stream is not supported" in by_id["stream"][0]["error"]["message"]
    assert "POST" in by_id["method"][0]["error"]["message"]
    unnamed = [result["error"]["message"] for result in by_id[None]]
    assert len(unnamed) == 5 and all(message.startswith("line ") for message in unnamed)
    assert any("--max-body-size" in message for message in unnamed)


async def test_answers_come_in_the_order_of_the_lines() -> None:
    """However long each takes."""
    lengths = [90, 1, 40, 3, 200, 2, 2, 60, 1, 1, 120, 5]
    lines: list[dict[str, Any] | bytes] = [
        line(str(i), messages=HI, max_tokens=length) for i, length in enumerate(lengths)
    ]
    lines.insert(3, b"  ")
    lines.insert(7, b"{")
    results = await run(lines, FakeServer(script=says("x" * 300)))
    names: list[str | None] = [str(i) for i in range(len(lengths))]
    names.insert(6, None)
    assert [result["custom_id"] for result in results] == names


@pytest.mark.parametrize("memory", [0, 3, 1 << 20])
def test_lines_that_are_early_wait(memory: int) -> None:
    output = io.BytesIO()
    with InOrder(output, memory) as in_order:
        for place in (3, 1, 0):
            in_order.put(place, b"%d\n" % place)
        assert output.getvalue() == b"0\n1\n"
        in_order.put(2, b"2" * 100_000 + b"\n")
        assert output.getvalue().splitlines() == [b"0", b"1", b"2" * 100_000, b"3"]
        for place in (8, 6, 4):
            in_order.put(place, b"%d\n" % place)
        assert output.getvalue().endswith(b"3\n4\n")
    # 5 and 7 never came: the run was broken off.
    assert output.getvalue().endswith(b"3\n4\n6\n8\n")


async def test_no_more_requests_are_open_than_allowed() -> None:
    server = FakeServer(ServerConfig(), says("x" * 20))
    most = 0
    submit = server.engine.submit

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        most = max(most, server.engine.num_unfinished + 1)
        return submit(*args, **kwargs)

    server.engine.submit = counted  # type: ignore[method-assign]
    await run([line(str(i)) for i in range(40)], server)
    assert most == 4


def test_files_that_are_not_there(tmp_path: Any) -> None:
    good = tmp_path / "in"
    good.write_text("")
    for source, target in ((tmp_path / "none", tmp_path / "out"), (good, tmp_path / "no" / "folder")):
        with pytest.raises(BatchError, match="No such file"), _opened(str(source), str(target)):
            pass
    with pytest.raises(BatchError), _opened("http://127.0.0.1:9/in", str(tmp_path / "out")):
        pass
