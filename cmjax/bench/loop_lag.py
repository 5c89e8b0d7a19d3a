"""How late a server's event loop was, by its own histogram at /metrics, between two readings."""

import asyncio
import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from cmjax.bench.load import UrlTarget
from cmjax.bench.tables import new_table
from cmjax.text import JsonObject

_NAME = "event_loop_lag_seconds"
_QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclasses.dataclass(frozen=True)
class LoopLag:
    """A histogram of lags, since the server's start or between two readings.

    Attributes:
        edges: `float64[buckets]`, upper bounds in seconds, ascending; the last is infinite.
        counts: `int64[buckets]`, lags in each bucket.
    """

    edges: np.ndarray
    counts: np.ndarray

    def __sub__(self, earlier: "LoopLag") -> "LoopLag":
        return LoopLag(self.edges, self.counts - earlier.counts)

    def figures(self) -> dict[str, float | int | None] | None:
        """How many there are, and the most that the p50, p99, p99.9 and the largest can be, in milliseconds: the upper
        bound of their bucket, None where it has none. None without lags."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        reached = np.cumsum(self.counts)
        found: dict[str, float | int | None] = {"count": total}
        for name, share in _QUANTILES.items():
            edge = float(self.edges[np.searchsorted(reached, math.ceil(share * total))])
            found[name] = edge * 1e3 if math.isfinite(edge) else None
        return found


def parse_lag(text: str) -> LoopLag | None:
    """The histogram in Prometheus's text, whatever its prefix and labels; None where it is not there."""
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        if family.name.endswith(_NAME):
            reached: dict[float, float] = {}
            for one in family.samples:  # of several labels, where there are
                if one.name.endswith("_bucket"):
                    edge = float(one.labels["le"])
                    reached[edge] = reached.get(edge, 0.0) + one.value
            if reached:
                edges = np.array(sorted(reached))
                return LoopLag(edges, np.diff([reached[edge] for edge in edges], prepend=0).astype(np.int64))
    return None


async def read_lag(target: UrlTarget) -> LoopLag | None:
    """The lags of a server since its start; None where it does not say them."""
    text = await target.get_text("/metrics")
    try:
        return None if text is None else parse_lag(text)
    except ValueError:  # a page of another kind
        return None


async def watch_idle(target: UrlTarget, seconds: float) -> JsonObject | None:
    """The figures of so many seconds without a load; None where there are none."""
    before = await read_lag(target)
    if before is None or seconds == 0:
        return None
    await asyncio.sleep(seconds)
    after = await read_lag(target)
    return None if after is None else (after - before).figures()


def lag_table(lags: Mapping[str, JsonObject]) -> Table:
    """A row for each stretch of time."""
    table = new_table("Lag of the server's event loop, at most, ms", "", *_QUANTILES, "samples", numbers_from=1)
    for name, found in lags.items():
        values = (found[one] for one in _QUANTILES)
        cells = ("over the last bucket" if one is None else f"{one:g}" for one in values)
        table.add_row(name, *cells, f"{found['count']:,}")
    return table
