"""Kills the processes of a server under seeded streams, and compares every token with an undisturbed run.

    python scripts/check_faults.py --kills 100                  # the demo model
    python scripts/check_faults.py --kills 12 --tiny            # random weights, seconds instead of minutes
    python scripts/check_faults.py --kills 8 --targets worker --signals STOP -- --max-num-seqs 4
    sudo python scripts/check_faults.py --kills 20 --tiny --machines --signals KILL    # two network namespaces

The engine core, workers and helpers take turns, and so do the signals. The next kill comes up to a second after the
server is ready again, so that some of them hit a restart. What stands after ``--`` goes to the server. With
``--machines``, the second of two pipeline stages is on another machine, whose agent and worker are killed, too; an
agent that was stopped is killed once it counts as lost. With ``--stages gloo``, Gloo moves their hidden states. With
``--layers``, each machine has half of every layer. With ``--ray``, Ray provides that machine (with the package in this
interpreter), and its node is killed as well. With ``--engines``, each machine has an engine of its own, also with
``--ray``.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from machines import CABLE, node_of_ray, other_machine
from processes import ROOT, Server, descendants, signals_as_exceptions

TITLES = {"core": r"octavo engine_core", "worker": r"octavo worker \d+", "helper": r"octavo \w+ helper"}
FAR_TITLES = {"agent": r"octavo machine 1", "remote": r"octavo worker 1"}
"""On the other machine."""
ENGINE_TITLES = {"agent": r"octavo engines 1-1", "far_core": r"octavo engine_core", "remote": r"octavo worker 0"}
"""On it if it has an engine of its own."""
RAY_TITLES = {"actor": r"ray::AgentActor", "node": r"\S*/raylet/raylet "}
"""Of Ray there."""
LOST = 9.0
"""Seconds after which a machine that is silent counts as lost, and a little more."""
SIGNALS = ("KILL", "SEGV", "ABRT", "STOP")
PATIENCE = 120.0
"""Seconds in which the server must be ready again."""


Servers: TypeAlias = list[Server]


class Stream(threading.Thread):
    """One seeded stream and its result."""

    def __init__(self, port: int, number: int, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.error = ""
        self._port = port
        self._body = {
            "prompt": [(number * 7 + i * i) % 250 + 3 for i in range(20 + number)],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "seed": number,
            "temperature": 0.8 if number % 2 else 0,
            "stream": True,
            "return_token_ids": True,
        }
        if number % 4 == 3:
            self._body["structured_outputs"] = {"regex": f"([a-z]{{1,9}} ){{{max_tokens}}}"}

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("POST", "/v1/completions", json.dumps(self._body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self.error = f"status {response.status}: {response.read(300)!r}"
            while not self.error and (line := response.readline()):
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = str(event["error"])
        for choice in event.get("choices", ()):
            self.tokens += choice["token_ids"]


@dataclass
class Kill:
    """One kill and its outcome."""

    target: str
    signal: str
    streams: list[Stream] = field(default_factory=list)
    """Those that were open."""
    seconds: float = 0.0
    """Until the process was replaced and the server was ready."""


titles = TITLES | FAR_TITLES | RAY_TITLES
"""Of all processes that may be killed."""


def find(servers: Servers, target: str) -> list[tuple[int, str]]:
    """Process ids and start times of some of the servers' processes."""
    server = servers[0] if target in TITLES else servers[-1]
    found = []
    for pid, started in sorted(descendants(server.pid)):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if re.match(titles[target], title):
                found.append((pid, started))
    return found


def is_ready(server: Server) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def kill(servers: Servers, target: str, signal_name: str, streams: list[Stream], rng: random.Random) -> Kill | None:
    """Sends a signal to such a process and waits until the server is whole again; None: there is none now.

    Raises:
        RuntimeError: It does not recover.
    """
    server, before = servers[0], find(servers, target)
    if not before:
        return None
    victim = rng.choice(before)
    result = Kill(target, signal_name, [stream for stream in streams if stream.is_alive()])
    begin = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim[0], signal.Signals[f"SIG{signal_name}"])
        if (target, signal_name) == ("agent", "STOP"):  # nobody else would end it
            time.sleep(LOST)
            os.kill(victim[0], signal.SIGKILL)
    # A helper that nobody needs may stay away, and a stopped one may stay as it is.
    while time.monotonic() - begin < PATIENCE:
        now = find(servers, target)
        is_replaced = target == "helper" or victim not in now and len(now) >= len(before)
        if is_replaced and is_ready(server):
            result.seconds = time.monotonic() - begin
            return result
        time.sleep(0.02)
    raise RuntimeError(f"the server did not recover from SIG{signal_name} to the {target}:\n{server.log()}")


def start_streams(server: Server, options: argparse.Namespace) -> list[Stream]:
    streams = [Stream(server.port, number, options.max_tokens) for number in range(options.streams)]
    for stream in streams:
        stream.start()
    return streams


def finish(streams: list[Stream]) -> list[list[int]]:
    """Waits for streams; gives their tokens.

    Raises:
        RuntimeError: One ended with an error.
    """
    for stream in streams:
        stream.join()
        if stream.error:
            raise RuntimeError(f"an undisturbed stream ended with {stream.error}")
    return [stream.tokens for stream in streams]


def disturb(servers: Servers, options: argparse.Namespace) -> tuple[list[Kill], list[str]]:
    """Runs streams and kills processes until there were enough.

    Args:
        servers: The server, and the processes of another machine if there is one.
        options: Of the command line.

    Returns:
        The kills, and what was wrong with streams.
    """
    server = servers[0]
    turns = [(target, name) for name in options.signals for target in options.targets]
    rng = random.Random(options.seed)
    expected = finish(start_streams(server, options))
    kills: list[Kill] = []
    problems: list[str] = []
    turn = 0
    missing_since: float | None = None
    while len(kills) < options.kills:
        streams = start_streams(server, options)
        while len(kills) < options.kills and any(stream.is_alive() for stream in streams):
            time.sleep(rng.uniform(0.0, 1.0))
            done = kill(servers, *turns[turn % len(turns)], streams, rng)
            turn += 1
            if done is not None:
                missing_since = None
                kills.append(done)
                print(f"{len(kills):4} {done.target:7} {done.signal:5} {done.seconds:6.1f} s", flush=True)
                continue
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > PATIENCE:  # a process that restarts may be away for as long
                raise RuntimeError(f"there is no process of {', '.join(options.targets)}")
        for number, stream in enumerate(streams):
            stream.join()
            if stream.tokens != expected[number]:
                stream.error = stream.error or "other tokens"
                problems.append(f"stream {number}: {stream.error}")
    return kills, problems


def print_table(kills: list[Kill]) -> None:
    rows: dict[tuple[str, str], list[Kill]] = defaultdict(list)
    for one in kills:
        rows[one.target, one.signal].append(one)
    print(f"\n{'process':8} {'signal':6} {'kills':>6} {'exact':>6} {'median':>8} {'longest':>8}")
    for (target, name), group in sorted(rows.items()):
        exact = sum(not any(stream.error for stream in one.streams) for one in group)
        seconds = [one.seconds for one in group]
        print(f"{target:8} {name:6} {len(group):6} {exact:6} {statistics.median(seconds):6.1f} s {max(seconds):6.1f} s")
    exact = sum(not any(stream.error for stream in one.streams) for one in kills)
    print(f"\n{exact} of {len(kills)} kills left every open stream exact")


def tiny_model() -> str:
    """A folder with a model of random weights."""
    sys.path.insert(0, str(ROOT))
    from tests import tiny

    return str(tiny.checkpoint("llama"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=400, help="tokens per stream; longer streams see more kills")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times of kills")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=[*TITLES, *FAR_TITLES, *RAY_TITLES, *ENGINE_TITLES],
        help="default: all that there are",
    )
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--model", default="", help="default: the demo model")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model with random weights")
    parser.add_argument("--machines", action="store_true", help="on two machines; needs root")
    parser.add_argument(
        "--layers", choices=["links", "gloo"], help="on two machines that divide each layer, and how they exchange it"
    )
    parser.add_argument(
        "--stages", choices=["links", "gloo"], help="on two machines with a pipeline stage each, and how states travel"
    )
    parser.add_argument("--engines", action="store_true", help="on two machines with an engine each; needs root")
    parser.add_argument("--ray", action="store_true", help="on two machines of a Ray cluster; needs root, and ray")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    model = tiny_model() if options.tiny else options.model
    is_far = options.machines or options.layers or options.stages
    far = {**FAR_TITLES, **RAY_TITLES} if options.ray else FAR_TITLES if is_far else {}
    if options.engines:
        far = {**ENGINE_TITLES, **RAY_TITLES} if options.ray else ENGINE_TITLES
        titles.update(far)
    options.targets = options.targets or [*TITLES, *far]
    flags = ["--max-num-seqs", str(options.streams)]
    flags += [*(["--model", model, "--kv-cache-memory", "256MiB"] if model else []), *arguments[split + 1 :]]
    with signals_as_exceptions(), contextlib.ExitStack() as stack:
        others = []
        if far:
            if "gloo" in (options.layers, options.stages):
                flags += ["--private-interface", CABLE]
            share = "-tp" if options.layers else "-pp"
            shape: dict[str, Any] = {"has_engine": options.engines, "share": share}
            other_one = node_of_ray(**shape) if options.ray else other_machine(flags, **shape)
            place, other = stack.enter_context(other_one)
            flags += place
            others.append(other)
        server = Server([sys.executable, "-m", "api", "--port", "{port}", *flags])
        stack.callback(server.stop)
        server.wait_ready("/readyz")
        kills, problems = disturb([server, *others], options)
    print_table(kills)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
