"""What a run of ``octavo bench serve`` found: its requests, and the figures of all of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from api.commands.bench.figures import describe
from api.commands.bench.options import Options


@dataclass
class RequestResult:
    """One request. Times in seconds, ``start`` from the start of the run."""

    start: float
    e2e: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_events: int = 0
    error: str = ""
    text: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.num_output_tokens < 2 or self.num_events < 2:
            return None
        return sum(self.itls) / (self.num_output_tokens - 1)


@dataclass
class Result:
    """A run: its requests in the order in which they were sent, and what it took."""

    options: Options
    model: str
    requests: list[RequestResult]
    duration: float
    """Seconds from the first request to the end of the last."""
    cpu_seconds: float
    """Processor time of this process meanwhile."""
    peak_concurrency: int

    def summary(self) -> dict[str, Any]:
        """All figures: counts, rates per second, and distributions in milliseconds."""
        good = [request for request in self.requests if not request.error]
        num_prompt_tokens = sum(request.num_prompt_tokens for request in good)
        num_output_tokens = sum(request.num_output_tokens for request in good)
        num_events = sum(request.num_events for request in good)
        tpots = [tpot for request in good if (tpot := request.tpot) is not None]
        seconds = max(self.duration, 1e-9)
        return {
            "completed": len(good),
            "failed": len(self.requests) - len(good),
            "duration_s": self.duration,
            "peak_concurrency": self.peak_concurrency,
            "requests_per_s": len(good) / seconds,
            "output_tokens_per_s": num_output_tokens / seconds,
            "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / seconds,
            "prompt_tokens": num_prompt_tokens,
            "cached_tokens": sum(request.num_cached_tokens for request in good),
            "output_tokens": num_output_tokens,
            "events": num_events,
            "tokens_per_event": num_output_tokens / num_events if num_events else 0.0,
            "mean_prompt_tokens": num_prompt_tokens / len(good) if good else 0.0,
            "ttft_ms": describe([request.ttft * 1e3 for request in good if request.num_events]),
            "itl_ms": describe([itl * 1e3 for request in good for itl in request.itls]),
            "tpot_ms": describe([tpot * 1e3 for tpot in tpots]),
            "e2e_ms": describe([request.e2e * 1e3 for request in good]),
            "goodput_requests_per_s": sum(map(self.is_good, good)) / seconds,
            "generator_cpu_share": self.cpu_seconds / seconds,
            "generator_us_per_event": self.cpu_seconds * 1e6 / num_events if num_events else 0.0,
        }

    def is_good(self, request: RequestResult) -> bool:
        """Whether a request that succeeded kept the bounds of ``--goodput``."""
        found = {"ttft": request.ttft, "tpot": request.tpot or 0.0, "e2el": request.e2e}
        return all(found[name] * 1e3 <= bound for name, bound in self.options.goodput.items())

    def errors(self) -> dict[str, int]:
        """Failures and how often each happened."""
        return dict(Counter(request.error for request in self.requests if request.error).most_common())

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; the API key is left out."""
        options = {key: value for key, value in asdict(self.options).items() if key != "api_key"}
        if math.isinf(self.options.request_rate):
            options["request_rate"] = None
        return {
            "label": self.options.label,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": self.model,
            "options": options,
            "summary": self.summary(),
            "errors": self.errors(),
        }
