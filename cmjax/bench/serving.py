"""What a load says of a server: the figures of `vllm bench serve`, under their names."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cmjax.bench.load import Record

DEFINITIONS = {
    "ttft": "from sending to the first chunk",
    "tpot": "(end to end - ttft) / (tokens - 1)",
    "itl": "between chunks; a chunk holds all tokens that a request got in one call",
    "e2el": "from sending to the last chunk",
    "goodput": "complete requests a second that keep every target",
}


def latencies(record: Record) -> dict[str, float]:
    """A complete request's times in milliseconds; `tpot` only where it has two tokens or more."""
    first, last = record.chunks[0], record.chunks[-1]
    found = {"ttft": (first - record.sent) * 1e3, "e2el": (last - record.sent) * 1e3}
    if record.num_output > 1:
        found["tpot"] = (last - first) * 1e3 / (record.num_output - 1)
    return found


def summarize(
    records: Sequence[Record],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (50, 90, 99),
    slo_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The report of a load; failures are counted by reason, and are in no mean.

    Args:
        records: of all requests.
        duration_s: of the load.
        percentiles: wanted of each time.
        slo_ms: targets by "ttft", "tpot" or "e2el".
    """
    complete = [record for record in records if record.is_complete]
    each = [latencies(record) for record in complete]
    samples = {name: [one[name] for one in each if name in one] for name in ("ttft", "tpot", "e2el")}
    samples["itl"] = [gap * 1e3 for record in complete for gap in np.diff(record.chunks)]
    num_input, num_output = (sum(getattr(r, name) for r in complete) for name in ("num_input", "num_output"))
    report: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(complete),
        "failed": len(records) - len(complete),
        "errors": dict(collections.Counter(record.error for record in records if record.error is not None)),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(complete) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
    }
    if slo_ms:
        good = sum(all(one.get(name, 0.0) <= limit for name, limit in slo_ms.items()) for one in each)
        report |= {"slo_ms": dict(slo_ms), "request_goodput": good / duration_s}
    for name, values in samples.items():
        if values:
            report |= {
                f"mean_{name}_ms": float(np.mean(values)),
                f"median_{name}_ms": float(np.median(values)),
                f"std_{name}_ms": float(np.std(values)),
            }
            report |= {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}
    return report


def plot(records: Sequence[Record], path: str) -> None:
    """A picture of a load: requests under way and tokens a second over time, and the times as distributions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    complete = [record for record in records if record.is_complete]
    figure, ((running, rate), (ttft, tpot)) = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    starts, ends = np.sort([r.sent for r in complete]), np.sort([r.chunks[-1] for r in complete])
    times = np.linspace(0, max(ends, default=1.0), 200)
    running.plot(times, np.searchsorted(starts, times) - np.searchsorted(ends, times))
    running.set(title="requests under way", xlabel="s")
    chunks = [(at, r.num_output / len(r.chunks)) for r in complete for at in r.chunks]
    counts, edges = np.histogram([at for at, _ in chunks], bins=60, weights=[n for _, n in chunks])
    rate.stairs(counts / np.diff(edges), edges)
    rate.set(title="tokens/s", xlabel="s")
    each = [latencies(record) for record in complete]
    for axes, name in ((ttft, "ttft"), (tpot, "tpot")):
        values = np.sort([one[name] for one in each if name in one])
        axes.plot(values, np.linspace(0, 1, len(values)))
        axes.set(title=f"share of requests with a {name.upper()} up to", xlabel="ms", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
