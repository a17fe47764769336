#!/usr/bin/env python
"""Compares steps of one worker with those of several ranks that share the model, on the same number of cores.

    python scripts/bench_ranks.py --model 1b --load-format dummy
    python scripts/bench_ranks.py --model folder --ranks 2 --threads 2 --decode 1 16 --prefill 512

One worker has all threads; each rank has its share of them and of the cores. All are loaded at once and take turns, so
what else runs on the machine concerns them alike. Printed: the median time of a step, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_models import SHAPES
from bench_step import EXPERT_SHAPES, Steps, folder_of

from executor.parallel import ParallelState, create_shared_memory, split_cores


@dataclass
class Team:
    """Processes that compute the same steps."""

    processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, options: argparse.Namespace, num_ranks: int) -> Team:
        """Starts the ranks; they load the model."""
        memory = create_shared_memory()
        cores = split_cores(num_ranks)
        command = [sys.executable, __file__, "--model", options.model, "--load-format", options.load_format]
        command += ["--decode", *map(str, options.decode), "--prefill", *map(str, options.prefill)]
        command += ["--context", str(options.context), "--steps", str(options.steps), "--ranks", str(num_ranks)]
        command += ["--threads", str(max(1, options.threads // num_ranks)), "--memory", str(memory)]
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--cores", *map(str, cores[rank])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(memory,),
            )
            for rank in range(num_ranks)
        ]
        os.close(memory)
        return cls(processes)

    def ask(self, line: str) -> str:
        """Has all ranks do something; returns what the first one says."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in self.processes if process.stdout is not None][0]

    def end(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def serve(options: argparse.Namespace) -> None:
    """A rank: computes what the lines of standard input ask for."""
    os.sched_setaffinity(0, options.cores)
    rank, size = options.rank, options.ranks
    state = ParallelState() if size == 1 else ParallelState(rank, size, rank=rank, memory_fd=options.memory)
    longest = max([options.context + options.rounds * options.steps + 1, *options.prefill])
    requests = max([1, *options.decode])
    steps = Steps(
        options.model,
        "bfloat16",
        max([512, options.context, *options.prefill]),
        requests,
        longest,
        options.load_format,
        parallel=state,
        num_threads=options.threads,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        if kind == "fill":
            steps.fill(int(count), options.context)
            times = [0.0]
        elif kind == "prefill":
            free = bytes(4) if steps.step_id else b""
            new = (steps.admit(0, int(count)),)
            times = [steps.run([0], [int(count)], new_reqs=new, finished_slots=free)]
        else:
            slots = list(range(int(count)))
            times = [steps.run(slots, [1] * len(slots)) for _ in range(options.steps)]
        print(statistics.median(times), flush=True)


def compare(options: argparse.Namespace) -> None:
    """Prints the table."""
    teams = [Team.start(options, size) for size in (1, options.ranks)]
    try:
        for team in teams:
            for process in team.processes:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
        print(f"{'step':>14} {'1 worker':>12} {f'{options.ranks} ranks':>12} {'ratio':>7}")
        for kind, counts in (("decode", options.decode), ("prefill", options.prefill)):
            for count in counts:
                if kind == "decode":
                    for team in teams:
                        team.ask(f"fill {count}")
                rounds = [[float(team.ask(f"{kind} {count}")) for team in teams] for _ in range(options.rounds)]
                alone, shared = (statistics.median(times) * 1e3 for times in zip(*rounds, strict=True))
                print(f"{f'{kind} {count}':>14} {alone:9.2f} ms {shared:9.2f} ms {shared / alone:7.2f}")
    finally:
        for team in teams:
            team.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = ", ".join((*SHAPES, *EXPERT_SHAPES))
    add("--model", required=True, help=f"folder, GGUF file, or with --load-format dummy one of {shapes}")
    add("--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights")
    add("--ranks", type=int, default=2, help="ranks that share the model")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of all together")
    add("--decode", type=int, nargs="*", default=[1, 16], help="requests that get one token each")
    add("--prefill", type=int, nargs="*", default=[], help="tokens of one prompt")
    add("--context", type=int, default=256, help="tokens before the first decode step")
    add("--steps", type=int, default=20, help="decode steps per round")
    add("--rounds", type=int, default=5, help="turns of each")
    for name in ("--rank", "--memory"):
        add(name, type=int, help=argparse.SUPPRESS)
    add("--cores", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        serve(options)
        return
    with folder_of(options.model) as options.model:
        compare(options)


if __name__ == "__main__":
    main()
