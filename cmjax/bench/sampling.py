"""`cmjax bench sampling`: what it costs a request to be sampled, with penalties or log probabilities, beside greedy."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.table import Table

from cmjax.bench.figures import latencies
from cmjax.bench.load import Record, Target, run_load
from cmjax.bench.report import machine
from cmjax.bench.tables import new_table, number
from cmjax.bench.trace import Prompts, TraceRequest
from cmjax.errors import UserError
from cmjax.options import check_bounds, option
from cmjax.text import JsonObject

GREEDY = "greedy"
_PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
# Kind -> what its requests send. The second greedy one says how far apart equal kinds are.
KINDS: Mapping[str, Mapping[str, float]] = {
    GREEDY: {"temperature": 0.0},
    "greedy, again": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "penalties": {"temperature": 1.0, **_PENALTIES},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "all of these": {"temperature": 1.0, "top_p": 0.9, **_PENALTIES, "logprobs": 5},
}
TIMES = ("ttft", "tpot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingBenchSettings:
    """How kinds of requests are compared."""

    rounds: int = option(20, "Each sends every kind once, in turn.", flag="--rounds", minimum=1)
    concurrency: str = option("1,8", "Requests sent together.", flag="--concurrency")
    prompt_len: int = option(64, "Tokens of a prompt.", flag="--input-len", minimum=1)
    output_len: int = option(64, "Tokens to generate.", flag="--output-len", minimum=2)
    seed: int = option(0, "Of the prompts.", flag="--seed")

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.each_concurrency

    @property
    def each_concurrency(self) -> list[int]:
        """The numbers of requests."""
        try:
            found = [int(part) for part in self.concurrency.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < 1:
            raise UserError(f"--concurrency {self.concurrency!r}: give positive numbers, such as 1,8")
        return found


@dataclasses.dataclass(frozen=True)
class Sample:
    """What became of requests of one kind that were sent together; round 0 is there to warm up, and does not count."""

    round: int
    kind: str
    concurrency: int
    records: list[Record]

    def mean_ms(self, name: str) -> float | None:
        """Of "ttft" or "tpot" over its requests; None where one failed or has none."""
        if not all(record.is_complete for record in self.records):
            return None
        each = [latencies(record) for record in self.records]
        return float(np.mean([one[name] for one in each])) if all(name in one for one in each) else None


async def measure(
    settings: SamplingBenchSettings, prompts: Prompts, target: Target, on_progress: Callable[[], None]
) -> list[Sample]:
    """Send them all: within a round, the kinds of one concurrency come one right after another, in an order of chance,
    each with prompts of its own, so that no cache of prompts helps one of them."""
    samples, order = [], np.random.default_rng(settings.seed)
    for index, concurrency in itertools.product(range(settings.rounds + 1), settings.each_concurrency):
        for kind in map(str, order.permutation(list(KINDS))):
            requests = [
                TraceRequest(0.0, prompts.cut(settings.prompt_len), settings.output_len, sampling=KINDS[kind])
                for _ in range(concurrency)
            ]
            records, _ = await run_load(requests, target)
            samples.append(Sample(index, kind, concurrency, records))
            on_progress()
    return samples


def make_report(settings: SamplingBenchSettings, samples: Sequence[Sample]) -> JsonObject:
    """Medians over the rounds, and those of the ratios to greedy in the same round, with their quartiles."""
    counted = [one for one in samples if one.round > 0]
    results = [_row(counted, kind, concurrency) for concurrency in settings.each_concurrency for kind in KINDS]
    errors = collections.Counter(record.error for one in samples for record in one.records if record.error)
    return {
        "benchmark": "sampling",
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "kinds": {kind: dict(fields) for kind, fields in KINDS.items()},
        "results": results,
        "errors": dict(errors),
    }


def _row(samples: Sequence[Sample], kind: str, concurrency: int) -> JsonObject:
    found: JsonObject = {"kind": kind, "concurrency": concurrency}
    by_round = {(one.kind, one.round): one for one in samples if one.concurrency == concurrency}
    for name in TIMES:
        pairs = []
        for (other, index), one in by_round.items():
            if other == kind:
                pair = one.mean_ms(name), by_round[GREEDY, index].mean_ms(name)
                pairs += [] if None in pair else [pair]
        own, greedy = np.array(pairs, np.float64).reshape(-1, 2).T
        found[f"{name}_ms"] = float(np.median(own)) if len(own) else None
        quartiles = np.percentile(own / greedy, (25, 50, 75)).tolist() if len(own) else (None,) * 3
        found |= dict(zip((f"{name}_ratio_{which}" for which in ("p25", "p50", "p75")), quartiles, strict=True))
    return found


def tables(report: JsonObject) -> list[Table]:
    """A table for each concurrency."""
    settings, found = report["settings"], []
    for concurrency, rows in itertools.groupby(report["results"], key=lambda row: row["concurrency"]):
        title = f"{concurrency} at once, {settings['prompt_len']} tokens in, {settings['output_len']} out"
        heads = [head for name in TIMES for head in (f"{name.upper()}, ms", "x greedy", "quartiles")]
        table = new_table(title, "kind", *heads, numbers_from=1)
        for row in rows:
            cells = []
            for name in TIMES:
                low, middle, high = (number(row[f"{name}_ratio_{p}"], "{:.2f}") for p in ("p25", "p50", "p75"))
                cells += [number(row[f"{name}_ms"], "{:,.1f}"), middle, f"{low} to {high}"]
            table.add_row(row["kind"], *cells)
        found.append(table)
    sent = (f"{kind}: {', '.join(f'{k} {v:g}' for k, v in fields.items())}" for kind, fields in report["kinds"].items())
    notes = [f"{count} failed: {why}" for why, count in report["errors"].items()]
    notes += [
        f"medians of {settings['rounds']} rounds, in each of which the kinds took turns; ratios of the same round"
    ]
    found[-1].caption = "\n".join([*notes, *sent])
    return found
