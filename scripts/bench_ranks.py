#!/usr/bin/env python
"""Compares steps of one worker with those of several ranks that share the model, on the same number of cores.

    python scripts/bench_ranks.py --model 1b --load-format dummy
    python scripts/bench_ranks.py --model folder --ranks 2 --threads 2 --decode 1 16 --prefill 512
    python scripts/bench_ranks.py --model folder --stages 2 --decode 16
    python scripts/bench_ranks.py --model folder --stages 2 --decode 16 --prefill 512 --machines
    python scripts/bench_ranks.py --model folder --ranks 2 --decode 1 16 --prefill 512 --machines

One worker has all threads; each rank has its share of them and of the cores. All are loaded at once and take turns, so
what else runs on the machine concerns them alike. Printed: the median time of a step, and the ratio of the medians.

With pipeline stages, requests decode in as many groups as there are stages, one step after another; printed is the time
in which each group has had one. The worker that is compared computes the same steps. With ``--machines``, stages
(or ranks, if there is one stage) are compared with those that are connected as if each were on a machine of its own, by
the loopback interface.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_models import SHAPES
from bench_step import EXPERT_SHAPES, Steps, folder_of

from executor.config import ParallelConfig
from executor.multiproc import LISTENER, STORE, Network
from executor.nodes.head import open_listeners
from executor.nodes.links import NetworkLinks
from executor.parallel import RANKS, SharedByRanks, awaited_from_afar, places, split_cores


@dataclass
class Team:
    """Processes that compute the same steps."""

    processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, options: argparse.Namespace, tp_size: int, pp_size: int, nnodes: int = 1) -> Team:
        """Starts the ranks; they load the model."""
        interface = options.interface if nnodes > 1 else ""
        ranks = places(ParallelConfig(tensor_parallel_size=tp_size, pipeline_parallel_size=pp_size, nnodes=nnodes))
        num_ranks = len(ranks)
        shared = [SharedByRanks([each for each in ranks if each.node_rank == node]) for node in range(nnodes)]
        found = [open_listeners(ranks, node, "127.0.0.1", interface) for node in range(nnodes)]
        listeners = {name: opened for each in found for name, opened in each.items()}
        endpoints = json.dumps({name: endpoint for name, (_, endpoint) in listeners.items()})
        cores = split_cores(num_ranks)
        command = [sys.executable, __file__, "--model", options.model, "--load-format", options.load_format]
        command += ["--decode", *map(str, options.decode), "--prefill", *map(str, options.prefill)]
        command += ["--context", str(options.context), "--steps", str(options.steps), "--lanes", str(options.stages)]
        command += ["--ranks", str(tp_size), "--stages", str(pp_size), "--nodes", str(nnodes), "--endpoints", endpoints]
        command += ["--threads", str(max(1, options.threads // num_ranks)), "--interface", interface]
        processes = []
        for place in ranks:
            given, rank = shared[place.node_rank].of(place), place.rank
            given |= {LISTENER + name: listeners[name][0] for name in awaited_from_afar(ranks, place)}
            if rank == 0 and STORE in listeners:
                given[LISTENER + STORE] = listeners[STORE][0]
            own = ["--rank", str(rank), "--cores", *map(str, cores[rank]), "--descriptors", json.dumps(given)]
            processes.append(
                subprocess.Popen(
                    [*command, *own],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    pass_fds=tuple(given.values()),
                )
            )
        for each in shared:
            each.close()
        for descriptor, _ in listeners.values():
            os.close(descriptor)
        return cls(processes)

    def ask(self, line: str) -> str:
        """Has all ranks do something; returns what the last one says: with stages, it is done last."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return [process.stdout.readline().strip() for process in self.processes if process.stdout is not None][-1]

    def end(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def serve(options: argparse.Namespace) -> None:
    """A rank: computes what the lines of standard input ask for."""
    os.sched_setaffinity(0, options.cores)
    config = ParallelConfig(
        tensor_parallel_size=options.ranks,
        pipeline_parallel_size=options.stages,
        nnodes=options.nodes,
        private_interface=options.interface,
    )
    ranks = places(config)
    given = json.loads(options.descriptors)
    state = replace(ranks[options.rank], memory_fd=given.get(RANKS, -1))
    links = None
    if options.nodes > 1:
        addresses = ("127.0.0.1",) * options.nodes
        network = Network(cluster_key=bytes(32), addresses=addresses, endpoints=json.loads(options.endpoints))
        sockets = {name.removeprefix(LISTENER): fd for name, fd in given.items() if name.startswith(LISTENER)}
        links = NetworkLinks(network, ranks, state, sockets)
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
        descriptors=given,
        links=links,
        ranks=config,
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
            groups = [list(range(lane, int(count), options.lanes)) for lane in range(min(options.lanes, int(count)))]
            begin = time.perf_counter()
            times = [sum(steps.run(slots, [1] * len(slots)) for slots in groups) for _ in range(options.steps)]
            if options.lanes > 1:  # stages overlap
                times = [(time.perf_counter() - begin) / options.steps]
        print(statistics.median(times), flush=True)
    if links is not None:
        links.close()


def compare(options: argparse.Namespace) -> None:
    """Prints the table."""
    sizes = options.ranks, options.stages
    num_ranks = options.ranks * options.stages
    titles = ("1 worker", f"{num_ranks} ranks")
    if options.machines:
        nnodes = options.stages if options.stages > 1 else options.ranks
        titles = ("1 machine", f"{nnodes} machines")
        teams = [Team.start(options, *sizes), Team.start(options, *sizes, nnodes)]
    else:
        teams = [Team.start(options, 1, 1), Team.start(options, *sizes)]
    try:
        for team in teams:
            for process in team.processes:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
        print(f"{'step':>14} {titles[0]:>12} {titles[1]:>12} {'ratio':>7}")
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
    add("--ranks", type=int, help="ranks that share each layer; default: 2, or 1 with stages")
    add("--stages", type=int, default=1, help="pipeline stages")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of all together")
    add("--decode", type=int, nargs="*", default=[1, 16], help="requests that get one token each")
    add("--prefill", type=int, nargs="*", default=[], help="tokens of one prompt")
    add("--context", type=int, default=256, help="tokens before the first decode step")
    add("--steps", type=int, default=20, help="decode steps per round")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--machines", action="store_true", help="compare ranks or stages of one machine with those of several")
    add("--interface", default="", help="with --machines, the --private-interface of ranks, such as lo")
    add("--rank", type=int, help=argparse.SUPPRESS)
    add("--nodes", type=int, default=1, help=argparse.SUPPRESS)
    add("--endpoints", default="{}", help=argparse.SUPPRESS)
    add("--lanes", type=int, default=1, help=argparse.SUPPRESS)
    add("--descriptors", help=argparse.SUPPRESS)
    add("--cores", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ranks = options.ranks or (2 if options.stages == 1 else 1)
    if options.rank is not None:
        serve(options)
        return
    with folder_of(options.model) as options.model:
        compare(options)


if __name__ == "__main__":
    main()
