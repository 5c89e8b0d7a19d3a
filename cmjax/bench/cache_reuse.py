"""`cmjax bench cache reuse`: prompts whose beginnings were computed before, without a cache, from the memory pool, from
the instance's own blocks, and over the VPC plane, in turn in one run."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.table import Table

from cmjax.bench.cache import BLOCK_SIZE, Tell, random_model, send, silent, started, ttft_s
from cmjax.bench.report import machine
from cmjax.bench.tables import define, new_table
from cmjax.errors import UserError
from cmjax.mesh import Supernode, fabric
from cmjax.model import Model, num_params, token_bytes
from cmjax.options import check_bounds, option
from cmjax.schedule import blocks_for
from cmjax.serve import Engine, EngineSettings
from cmjax.serve.caching import CacheSettings
from cmjax.text import JsonObject

MOST_ASKED = 90.0  # percent of reuse that the summary is about
BOUNDS = {"speedup": 2.28, "share_of_own": 0.8, "cost": 0.03}
# Of the paper (arXiv:2506.12708v3): tokens that an NPU prefills a second, bytes of a token's latents in DeepSeek-R1
# (576 numbers in each of 61 layers, bfloat16), and NPUs of a node, which share its link to the VPC plane.
NPU_TOKENS_PER_S = 6688
R1_TOKEN_BYTES = 576 * 61 * 2
NPUS_PER_NODE = Supernode.preset("cloudmatrix384").npus_per_node
VARIANTS = {
    "off": "no prefix cache",
    "pool": "the shared blocks are in the memory pool, and not in the instance",
    "own": "they are in the instance's own blocks, where the request before has left them",
    "vpc": "as pool, with the modelled delay of the VPC plane on what moves between pool and instance",
}
DEFINITIONS = {
    **VARIANTS,
    "TTFT": "of a prompt alone, from its arrival to its first token",
    "tokens/s": "prompt tokens of a burst over the time from its submission to the last first token",
    "ratio": "off over this in the same round (tokens/s: this over off); medians of the rounds, and quartiles",
    "cost": "of the cache where nothing is shared; in throughput with all the time until everything is stored, "
    "though storing goes on beside the next prefill",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReuseSettings:
    """Prompts that share their beginnings with prompts before them."""

    reuse: str = option("0,12.5,25,50,75,90", "Percent of a prompt that were computed before.", flag="--reuse")
    prompt_len: int = option(4096, "Tokens of a prompt.", flag="--input-len", minimum=2)
    burst: int = option(2, "Prompts sent together, to measure throughput.", flag="--burst", minimum=1)
    rounds: int = option(5, "Each sends every share in every variant, in turn.", flag="--rounds", minimum=1)
    stretch: float | None = option(
        None,
        "A prefill takes so many times what the paper's NPUs take; modelled transfers are stretched as much.",
        flag="--delay-multiplier",
        minimum=0,
        is_open=True,
        unset="measured",
    )
    seed: int = option(0, "Of weights and prompts.", flag="--seed")

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.each_reuse

    @property
    def each_reuse(self) -> list[float]:
        """The shares in percent, ascending."""
        try:
            found = sorted({float(part) for part in self.reuse.split(",")})
        except ValueError:
            found = []
        if not found or not all(0 <= one < 100 for one in found):
            raise UserError(f"--reuse {self.reuse!r}: give percentages below 100, such as 0,50,90")
        return found


@dataclasses.dataclass(frozen=True)
class Sample:
    """What became of prompts that were sent together.

    Attributes:
        ttft_s: of the first of them.
        seconds: from their submission to the last first token.
        stored_s: from then on until all blocks were stored.
        num_tokens: of the prompts.
        num_own, num_pool: of these, those found in the instance's own blocks and in the pool.
    """

    ttft_s: float
    seconds: float
    stored_s: float
    num_tokens: int
    num_own: int
    num_pool: int


# (round, share in percent, variant, whether it is a burst)
Key = tuple[int, float, str, bool]


class _Prompts:
    """Prompts that share a beginning: the same one for each share and place in a burst, and other ends every time."""

    def __init__(self, settings: ReuseSettings, vocab_size: int, cache_block: int) -> None:
        self._length, self._vocab_size, self.block_tokens = settings.prompt_len, vocab_size, cache_block
        self._rng = np.random.default_rng(settings.seed)
        self.beginnings = {
            (reuse, place): self.random(self.num_shared(reuse))
            for reuse in settings.each_reuse
            for place in range(settings.burst + 1)
        }

    def num_shared(self, reuse: float) -> int:
        """Tokens in whole cached blocks, at least one of the prompt's being left to compute."""
        wanted = round(reuse / 100 * self._length / self.block_tokens)
        return min(wanted, (self._length - 1) // self.block_tokens) * self.block_tokens

    def make(self, reuse: float, places: Sequence[int]) -> list[list[int]]:
        """A prompt for each place, with an end of its own."""
        shared = [self.beginnings[reuse, place] for place in places]
        return [one + self.random(self._length - len(one)) for one in shared]

    def random(self, length: int) -> list[int]:
        """Any tokens."""
        return self._rng.integers(0, self._vocab_size, length).tolist()


def vpc_delay(stretch: float, token_bytes: int) -> fabric.DelayModel:
    """The VPC plane as an NPU of the paper sees it: its share of the node's link, for tokens of this model's size in
    place of DeepSeek-R1's, in time stretched `stretch` times. So a transfer takes as much of a prefill as there."""
    figures = Supernode.preset("cloudmatrix384").plane("vpc").path_figures("npu_cpu", "read")
    rate = figures.bytes_per_s / NPUS_PER_NODE * token_bytes / R1_TOKEN_BYTES
    return fabric.DelayModel({"vpc": figures.latency_s}, {"vpc": rate}, stretch)


@contextlib.contextmanager
def _delayed(delay: fabric.DelayModel | None) -> Iterator[None]:
    fabric.configure(delay=delay)
    try:
        yield
    finally:
        fabric.configure(delay=None)


class _Cached:
    """An engine with a cache, whose instance has blocks for a burst and one prompt more.

    Args:
        delay: for all that it does.
    """

    def __init__(
        self, engine: Engine, prompts: _Prompts, settings: ReuseSettings, delay: fabric.DelayModel | None
    ) -> None:
        self._engine, self._delay = engine, delay
        self._others = [prompts.random(settings.prompt_len) for _ in range(settings.burst + 1)]
        for one in [*self._others, *([*beginning, 0] for beginning in prompts.beginnings.values() if beginning)]:
            self.measure([one])

    def measure(self, prompts: Sequence[Sequence[int]]) -> Sample:
        """See `measure`."""
        with _delayed(self._delay):
            return measure(self._engine, prompts)

    def crowd_out(self, last: Sequence[int]) -> None:
        """Fill the instance's own blocks with other prompts, which the pool has; a new one comes last."""
        with _delayed(self._delay):
            for one in self._others:
                send(self._engine, [one])
        self.measure([last])


def measure(engine: Engine, prompts: Sequence[Sequence[int]]) -> Sample:
    """Send prompts together, and wait until all that is new of them is stored."""
    before, begin = engine.stats().cache, time.perf_counter()
    handles = send(engine, prompts)
    end = time.perf_counter()
    engine.wait_until_stored()
    stored, after = time.perf_counter(), engine.stats().cache
    return Sample(
        ttft_s=ttft_s(handles[0]),
        seconds=end - begin,
        stored_s=stored - end,
        num_tokens=sum(map(len, prompts)),
        num_own=after.num_hits - before.num_hits,
        num_pool=after.num_pool_hits - before.num_pool_hits,
    )


def run(
    settings: ReuseSettings, model: Model | None = None, *, cache_block: int = 128, tell: Tell = silent
) -> JsonObject:
    """Time every share in every variant, on one device.

    A round sends a share's prompts without a cache; with one, where their beginnings are in the pool, and the instance
    is full of others; then prompts with the same beginnings, which are in the instance now; and as from the pool, but
    delayed. What each sample found, and where, is counted, and told where it is not so (`as_meant`).

    Args:
        model: None: a random one.
        cache_block: tokens of a block of the pool.
    """
    tell("compiling", 0, None)
    model = model or random_model(seed=settings.seed)
    longest = settings.prompt_len + BLOCK_SIZE
    sizes = EngineSettings(
        max_model_len=longest,
        max_num_seqs_per_rank=1,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=min(4096, settings.prompt_len),
        num_prefill_kv_blocks=(settings.burst + 1) * blocks_for(longest, BLOCK_SIZE),
    )
    prompts = _Prompts(settings, model.config.vocab_size, cache_block)
    a_token = token_bytes(model.config, model.dtype)
    with contextlib.ExitStack() as stack:
        off, *cached = (
            stack.enter_context(started(model, sizes, cache))
            for cache in (
                None,
                *(
                    CacheSettings(cache_block_size=cache_block, plane=plane, decode_blocks="never", fetch="always")
                    for plane in ("ub", "vpc")
                ),
            )
        )
        prefill_s = float(np.median([measure(off, [prompts.random(settings.prompt_len)]).ttft_s for _ in range(4)][1:]))
        stretch = settings.stretch or prefill_s * NPU_TOKENS_PER_S / settings.prompt_len
        tell("filling the pool", 0, None)
        pool, vpc = (
            _Cached(engine, prompts, settings, delay)
            for engine, delay in zip(cached, (None, vpc_delay(stretch, a_token)), strict=True)
        )
        samples = dict(_measure_all(settings, off, pool, vpc, prompts, tell))
    found = {
        "cache_block": cache_block,
        "num_parameters": num_params(model.params),
        "prefill_s": prefill_s,
        "stretch": stretch,
        "token_bytes": a_token,
    }
    shared = {reuse: prompts.num_shared(reuse) for reuse in settings.each_reuse}
    return {
        "benchmark": "cache reuse",
        "machine": machine(),
        "settings": dataclasses.asdict(settings) | found,
        **summarize(settings, samples, shared),
        "definitions": DEFINITIONS,
    }


def _measure_all(
    settings: ReuseSettings, off: Engine, pool: _Cached, vpc: _Cached, prompts: _Prompts, tell: Tell
) -> Iterator[tuple[Key, Sample]]:
    """A sample of one prompt, and one of a burst, of each share, variant and round."""
    turns = list(itertools.product(range(settings.rounds), settings.each_reuse, (False, True)))
    for done, (index, reuse, is_burst) in enumerate(turns):
        tell("measuring", done, len(turns))
        places, shared = (range(1, settings.burst + 1) if is_burst else [0]), prompts.num_shared(reuse)
        # A step is faster after one of its own size: before each sample there is one of what it will have to compute.
        # ("own" comes right after "pool".)
        length = settings.prompt_len
        measure(off, [prompts.random(length)])
        yield (index, reuse, "off", is_burst), measure(off, prompts.make(reuse, places))
        pool.crowd_out(prompts.random(length - shared))
        yield (index, reuse, "pool", is_burst), pool.measure(prompts.make(reuse, places))
        yield (index, reuse, "own", is_burst), pool.measure(prompts.make(reuse, places))
        vpc.crowd_out(prompts.random(length - shared))
        yield (index, reuse, "vpc", is_burst), vpc.measure(prompts.make(reuse, places))


def summarize(settings: ReuseSettings, samples: Mapping[Key, Sample], shared: Mapping[float, int]) -> JsonObject:
    """`results`, a row for each share and variant; `summary`, what is asked of them where they have it; `as_meant`,
    whether every sample found its prompts' beginnings where its variant has them, and nothing elsewhere.

    Args:
        shared: share in percent -> tokens that prompts share.
    """
    rows = [
        _row(reuse, variant, samples, settings.rounds) | {"num_shared": shared[reuse]}
        for reuse, variant in itertools.product(settings.each_reuse, VARIANTS)
    ]
    found = {(row["reuse"], row["variant"]): row for row in rows}
    summary: dict[str, dict[str, float]] = {}
    if MOST_ASKED in settings.each_reuse:
        pool, own = (
            {n: found[MOST_ASKED, v][f"{n}_ratio"][1] for n in ("ttft", "throughput")} for v in ("pool", "own")
        )
        summary["speedup"] = pool
        summary["share_of_own"] = {name: pool[name] / own[name] for name in pool}
    if 0.0 in settings.each_reuse:
        row = found[0.0, "pool"]
        summary["cost"] = {"ttft": 1 / row["ttft_ratio"][1] - 1, "throughput": 1 / row["stored_ratio"][1] - 1}
    return {
        "results": rows,
        "summary": summary,
        "bounds": BOUNDS,
        "as_meant": all(
            _is_as_meant(variant, one, shared[reuse] * (settings.burst if is_burst else 1))
            for (_, reuse, variant, is_burst), one in samples.items()
        ),
    }


def _is_as_meant(variant: str, sample: Sample, num_shared: int) -> bool:
    own, pool = num_shared * (variant == "own"), num_shared * (variant in ("pool", "vpc"))
    return (sample.num_own, sample.num_pool) == (own, pool)


def _row(reuse: float, variant: str, samples: Mapping[Key, Sample], rounds: int) -> JsonObject:
    """Medians over the rounds, and the quartiles of what off takes over what this takes in the same round."""
    (alone, off_alone), (bursts, off_bursts) = (
        [[samples[index, reuse, name, is_burst] for index in range(rounds)] for name in (variant, "off")]
        for is_burst in (False, True)
    )
    found = [*alone, *bursts]
    off_seconds = [one.seconds for one in off_bursts]
    return {
        "reuse": reuse,
        "variant": variant,
        "ttft_s": float(np.median([one.ttft_s for one in alone])),
        "tokens_per_s": float(np.median([one.num_tokens / one.seconds for one in bursts])),
        "stored_s": float(np.median([one.stored_s for one in bursts])),
        "ttft_ratio": _quartiles([one.ttft_s for one in off_alone], [one.ttft_s for one in alone]),
        "throughput_ratio": _quartiles(off_seconds, [one.seconds for one in bursts]),
        "stored_ratio": _quartiles(off_seconds, [one.seconds + one.stored_s for one in bursts]),
        "found_own": sum(one.num_own for one in found) / sum(one.num_tokens for one in found),
        "found_pool": sum(one.num_pool for one in found) / sum(one.num_tokens for one in found),
    }


def _quartiles(base: Sequence[float], other: Sequence[float]) -> list[float]:
    return np.percentile(np.divide(base, other), (25, 50, 75)).tolist()


def tables(report: JsonObject) -> list[Table]:
    """All shares and variants, and what is asked of them."""
    settings = report["settings"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, prompts of {settings['prompt_len']:,} "
        f"tokens, bursts of {settings['burst']}; {settings['rounds']} rounds"
    )
    columns = ("shared", "variant", "found", "TTFT, ms", "ratio", "quartiles", "tokens/s", "ratio", "quartiles")
    table = new_table(title, *columns, numbers_from=2)
    for row in report["results"]:
        cells = [f"{row['found_own'] + row['found_pool']:.1%}"]
        for value, name in ((f"{row['ttft_s'] * 1e3:,.0f}", "ttft"), (f"{row['tokens_per_s']:,.0f}", "throughput")):
            low, middle, high = row[f"{name}_ratio"]
            cells += [value, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(f"{row['num_shared'] / settings['prompt_len']:.1%}", row["variant"], *cells)
    if not report["as_meant"]:
        table.caption = "NOT as meant: some samples found other than what their variant has, see found_own, found_pool"
    summary = new_table("Asked", "what", "TTFT", "throughput", "bound", numbers_from=1)
    texts = {
        "speedup": ("{:.2f}", f"{MOST_ASKED:g} % from the pool, times no cache", "at least"),
        "share_of_own": ("{:.1%}", f"{MOST_ASKED:g} % from the pool, of the ratio from the own blocks", "at least"),
        "cost": ("{:.1%}", "nothing shared, what the cache costs", "under"),
    }
    for name, found in report["summary"].items():
        form, text, side = texts[name]
        cells = [form.format(found[one]) for one in ("ttft", "throughput")]
        summary.add_row(text, *cells, f"{side} {form.format(report['bounds'][name])}")
    delay = (
        f"a prefill of {settings['prompt_len']:,} tokens takes {settings['prefill_s']:.2f} s here, so transfers over "
        f"the VPC plane are stretched {settings['stretch']:.3g} times; a token of {settings['token_bytes']:,} bytes "
        f"takes what one of {R1_TOKEN_BYTES:,} (DeepSeek-R1) takes with 1/{NPUS_PER_NODE} of a node's link"
    )
    return [table, define(summary, report["definitions"] | {"delay": delay})]


def plot(report: JsonObject, path: str) -> None:
    """TTFT and throughput over the share that is reused, a line for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant in VARIANTS:
        rows = [row for row in report["results"] if row["variant"] == variant]
        shares = [row["reuse"] for row in rows]
        left.plot(shares, [row["ttft_s"] for row in rows], marker="o", label=variant)
        right.plot(shares, [row["tokens_per_s"] for row in rows], marker="o", label=variant)
    left.set(title="time to first token", ylabel="s")
    right.set(title="prefill throughput", ylabel="prompt tokens/s")
    for axes in (left, right):
        axes.set_xlabel("computed before, % of the prompt")
        axes.set_ylim(bottom=0)
    left.legend()
    figure.savefig(path, dpi=120)
