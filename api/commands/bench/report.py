"""Results of a run as text, as JSON, and in the format of vLLM's benchmark."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from api.commands.bench.figures import compare, format_comparison, format_distributions, percentile
from api.commands.bench.options import Output
from api.commands.bench.result import Result


def format_report(result: Result) -> str:
    """A readable summary of a run."""
    figures = result.summary()
    lines = [
        f"{result.options.label or result.model}: {figures['completed']} requests in {figures['duration_s']:.2f} s, "
        f"{figures['failed']} failed, peak concurrency {figures['peak_concurrency']}",
        f"requests/s {figures['requests_per_s']:.2f}   output tokens/s {figures['output_tokens_per_s']:.1f}   "
        f"total tokens/s {figures['total_tokens_per_s']:.1f}",
        f"prompt tokens {figures['prompt_tokens']} (mean {figures['mean_prompt_tokens']:.1f}, "
        f"{figures['cached_tokens']} cached)   output tokens {figures['output_tokens']} in {figures['events']} events "
        f"({figures['tokens_per_event']:.3f} per event)",
        format_distributions(
            {
                "TTFT (ms)": figures["ttft_ms"],
                "ITL (ms)": figures["itl_ms"],
                "TPOT (ms)": figures["tpot_ms"],
                "E2E (ms)": figures["e2e_ms"],
            }
        ),
        f"generator: {figures['generator_cpu_share']:.0%} of a core, "
        f"{figures['generator_us_per_event']:.1f} us per event",
    ]
    if figures["generator_cpu_share"] > 0.8:
        lines.append("warning: the load generator was busy most of the time; the server may be faster than measured")
    if result.options.goodput:
        bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in result.options.goodput.items())
        lines.append(f"requests/s within {bounds}: {figures['goodput_requests_per_s']:.2f}")
    lines += [f"failed {count} times: {error}" for error, count in result.errors().items()]
    return "\n".join(lines)


def write(result: Result, output: Output) -> None:
    """Compares and writes the requested results.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: The earlier run is not a valid result file.
    """
    report = result.to_dict()
    if output.compare:
        old = json.loads(Path(output.compare).read_text())
        rows = compare(old["summary"], report["summary"])
        print(format_comparison(rows, old.get("label") or "old", result.options.label or "new"))
    if output.json:
        Path(output.json).write_text(json.dumps(report, indent=1) + "\n")
    if output.save_result or output.save_detailed:
        rate = "inf" if math.isinf(result.options.request_rate) else f"{result.options.request_rate:g}"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = output.result_filename or f"octavo-{rate}qps-{result.model.split('/')[-1]}-{stamp}.json"
        target = Path(output.result_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content = vllm_report(result, is_detailed=output.save_detailed)
        content |= dict(word.partition("=")[::2] for word in output.metadata)
        target.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {target}")


def vllm_report(result: Result, *, is_detailed: bool = False) -> dict[str, Any]:
    """Results with the names of vLLM's benchmark. Times are in milliseconds, except per-request ones."""
    options, figures = result.options, result.summary()
    good = [request for request in result.requests if not request.error]
    report: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if options.endpoint == "chat" else "openai",
        "label": options.label or None,
        "model_id": result.model,
        "tokenizer_id": None,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "duration": figures["duration_s"],
        "completed": figures["completed"],
        "failed": figures["failed"],
        "total_input_tokens": figures["prompt_tokens"],
        "total_output_tokens": figures["output_tokens"],
        "request_throughput": figures["requests_per_s"],
        "request_goodput": figures["goodput_requests_per_s"] if options.goodput else None,
        "output_throughput": figures["output_tokens_per_s"],
        "total_token_throughput": figures["total_tokens_per_s"],
        "max_concurrent_requests": figures["peak_concurrency"],
    }
    for name, values in (
        ("ttft", [request.ttft for request in good if request.num_events]),
        ("tpot", [tpot for request in good if (tpot := request.tpot) is not None]),
        ("itl", [itl for request in good for itl in request.itls]),
        ("e2el", [request.e2e for request in good]),
    ):
        ordered = sorted(value * 1e3 for value in values) or [0.0]
        report[f"mean_{name}_ms"] = statistics.fmean(ordered)
        report[f"median_{name}_ms"] = percentile(ordered, 50)
        report[f"std_{name}_ms"] = statistics.pstdev(ordered)
        for percent in (90, 95, 99):
            report[f"p{percent}_{name}_ms"] = percentile(ordered, percent)
    if is_detailed:
        report |= {
            "input_lens": [request.num_prompt_tokens for request in result.requests],
            "output_lens": [request.num_output_tokens for request in result.requests],
            "ttfts": [request.ttft for request in result.requests],
            "itls": [request.itls for request in result.requests],
            "start_times": [request.start for request in result.requests],
            "errors": [request.error for request in result.requests],
        }
    return report
