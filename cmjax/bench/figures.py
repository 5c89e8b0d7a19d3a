"""The figures of a load: what its times are, and what is wanted of them."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from cmjax.bench.load import Record
from cmjax.errors import UserError
from cmjax.options import option
from cmjax.text import JsonObject

TIMES = ("ttft", "tpot", "itl", "icl", "e2el")

# docs/load.md says the same, and how other load generators call them.
DEFINITIONS = {
    "ttft": "a request: from sending it to its first chunk, which holds one token or several, as every chunk may",
    "tpot": "a request: (e2el - ttft) / (tokens - 1)",
    "itl": "a token: the gap between its chunk and the one before, over the tokens of the chunk; the first has none",
    "icl": "a chunk: the gap between it and the one before",
    "e2el": "a request: from sending it to its last chunk",
    "goodput": "a load: complete requests a second that keep every target",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FigureSettings:
    """What is wanted of the times of a load."""

    targets: tuple[str, ...] = option(
        (), "Count requests that keep it: ttft:500, tpot:50, e2el:9000 (ms).", flag="--slo"
    )
    percentiles: str = option("50,90,99", "Of each time.", flag="--percentiles")
    plot: str | None = option(None, "Draw the load to this file; needs cmjax[plot].", flag="--plot", metavar="FILE")

    def __post_init__(self) -> None:
        _ = self.each_percentile, self.slo_ms

    @property
    def each_percentile(self) -> list[float]:
        """The percentiles as numbers."""
        try:
            found = [float(part) for part in self.percentiles.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 <= one <= 100 for one in found):
            raise UserError(f"--percentiles {self.percentiles!r}: give numbers from 0 to 100, such as 50,90,99")
        return found

    @property
    def slo_ms(self) -> dict[str, float]:
        """The targets by "ttft", "tpot" or "e2el"."""
        found = {}
        for text in self.targets:
            name, _, limit = text.partition(":")
            try:
                found[name] = float(limit)
            except ValueError:
                found[name] = 0.0
            if name not in ("ttft", "tpot", "e2el") or not found[name] > 0:
                raise UserError(f"--slo {text!r} is no target; give ttft:500, tpot:50 or e2el:9000, in milliseconds")
        return found


def latencies(record: Record) -> dict[str, float]:
    """A complete request's times in milliseconds; `tpot` only where its tokens came in two chunks or more."""
    first, last = record.chunks[0], record.chunks[-1]
    found = {"ttft": (first - record.sent) * 1e3, "e2el": (last - record.sent) * 1e3}
    if len(record.chunks) > 1:
        found["tpot"] = (last - first) * 1e3 / (record.num_output - 1)
    return found


def gaps(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds before each chunk but the first, and as each of their tokens has them: `(icl, itl)`."""
    between, counts = np.diff(record.chunks) * 1e3, np.array(record.counts[1:], np.int64)
    return between, np.repeat(between / np.maximum(counts, 1), counts)


def summarize(
    records: Sequence[Record],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (50, 90, 99),
    slo_ms: Mapping[str, float] | None = None,
) -> JsonObject:
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
    both = [gaps(record) for record in complete]
    samples["itl"] = [gap for _, itl in both for gap in itl]
    samples["icl"] = [gap for icl, _ in both for gap in icl]
    num_input, num_output = (sum(getattr(r, name) for r in complete) for name in ("num_input", "num_output"))
    report: JsonObject = {
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
