"""From the samples of a run to its numbers, and from these to a table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minisgl.bench.load import Sample
from minisgl.bench.record import Json

_METRICS = {
    "ttft_ms": "time to first token, ms",
    "itl_ms": "inter-token latency, ms",
    "chunk_gap_ms": "gap between chunks, ms",
    "latency_ms": "end to end, ms",
}
_STATISTICS = ("mean", "p50", "p90", "p99")
_MAX_REASONS = 10
_LATE_MS = 10  # a client that starts requests later than this is short of CPU


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count as good, in milliseconds; None: anything."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def met(self, sample: Sample) -> bool:
        """Whether an answered request kept both. One without an ITL (a single token) keeps that limit."""
        return _within(sample.ttft, self.ttft_ms) and _within(sample.itl, self.itl_ms)

    def __bool__(self) -> bool:
        return (self.ttft_ms, self.itl_ms) != (None, None)

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_ms), ("ITL", self.itl_ms))
        return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in named if limit is not None)


def summarize(workload: str, samples: Sequence[Sample], limits: Limits, open_loop: bool) -> Json:
    """The numbers of one run. Latencies and token counts are of the requests that were answered.

    Rates are per second from the first start to the last piece of text. `chunk_gap_ms` pools the gaps of all
    requests between pieces of text; a piece may hold several tokens, and pieces of one read have no gap.
    `open_loop`: nothing but the client's own slowness can delay a first turn, so this is reported.
    """
    good = [sample for sample in samples if sample.error is None]
    ends = [sample.chunks[-1] for sample in samples if sample.chunks]
    duration = max(ends) - min(sample.start for sample in samples) if ends else 0.0
    inputs, outputs = sum(sample.prompt_tokens for sample in good), sum(sample.tokens for sample in good)
    cached = [sample.cached_tokens for sample in good if sample.cached_tokens is not None]

    def rate(count: float) -> float | None:
        return count / duration if duration else None

    result: Json = {
        "workload": workload,
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "errors": dict(Counter(sample.error for sample in samples if sample.error is not None).most_common()),
        "duration_s": duration,
        "input_tokens": inputs,
        "cached_tokens": sum(cached) if cached else None,
        "output_tokens": outputs,
        "cut_short": sum(sample.tokens < sample.asked_tokens for sample in good),
        "output_tokens_per_s": rate(outputs),
        "total_tokens_per_s": rate(inputs + outputs),
        "requests_per_s": rate(len(good)),
        "ttft_ms": _statistics(sample.ttft for sample in good),
        "itl_ms": _statistics(sample.itl for sample in good),
        "chunk_gap_ms": _statistics(gap for sample in good for gap in np.diff(sample.chunks)),
        "latency_ms": _statistics(sample.latency for sample in good),
    }
    if limits:
        result["limits"] = str(limits)
        result["goodput_requests_per_s"] = rate(sum(map(limits.met, good)))
    if open_loop:
        result["worst_lag_ms"] = 1000 * max(
            (s.start - s.arrival for s in samples if s.turn == 0), default=0.0
        )
    return result | {"per_request": [_raw(sample) for sample in samples]}


def table(result: Json) -> str:
    """The result as lines for a terminal."""
    lines = [f"{result['workload']}: {result['requests']} requests in {result['duration_s']:.2f} s"]
    lines.append(f"{'':<26}" + "".join(f"{name:>11}" for name in _STATISTICS))
    for key, name in _METRICS.items():
        found = result[key] or {}
        cells = [f"{found[column]:>11,.2f}" if column in found else f"{'-':>11}" for column in _STATISTICS]
        lines.append(f"{name:<26}" + "".join(cells))
    for key, name in (("output", "output tokens/s"), ("total", "input + output tokens/s")):
        lines.append(f"{name:<26}{_number(result[key + '_tokens_per_s'])}")
    lines.append(f"{'requests/s':<26}{_number(result['requests_per_s'])}")
    if "limits" in result:
        goodput = _number(result["goodput_requests_per_s"])
        lines.append(f"{'goodput, requests/s':<26}{goodput}   {result['limits']}")
    cached = result["cached_tokens"]
    known = "" if cached is None else f", of these {cached:,} from the prefix cache"
    lines.append(f"tokens: {result['input_tokens']:,} in{known}; {result['output_tokens']:,} out")
    if result["cut_short"]:
        lines.append(f"{result['cut_short']} answers have fewer tokens than were asked for")
    if result.get("worst_lag_ms", 0) > _LATE_MS:
        lines.append(f"the client was late: a request started {result['worst_lag_ms']:.0f} ms after its time")
    errors = list(result["errors"].items())
    lines.append(f"errors: {result['failed']}")
    lines += [f"{count:>8} x {reason}" for reason, count in errors[:_MAX_REASONS]]
    if len(errors) > _MAX_REASONS:
        lines.append(f"{'':>8}   and {len(errors) - _MAX_REASONS} more reasons, in the file of --out")
    return "\n".join(lines)


def _statistics(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None of nothing."""
    known = np.fromiter((1000 * value for value in seconds if value is not None), float)
    if known.size == 0:
        return None
    percentiles = np.percentile(known, (50, 90, 99))
    return dict(zip(_STATISTICS, (float(known.mean()), *map(float, percentiles)), strict=True))


def _within(seconds: float | None, limit_ms: float | None) -> bool:
    return seconds is None or limit_ms is None or 1000 * seconds <= limit_ms


def _number(value: float | None) -> str:
    return f"{'-':>11}" if value is None else f"{value:>11,.2f}"


def _raw(sample: Sample) -> Json:
    """All of a request but its single gaps. Times in seconds after the start of the run."""
    end = sample.chunks[-1] if sample.chunks else None
    return vars(sample) | {"ttft": sample.ttft, "end": end, "chunks": len(sample.chunks)}
