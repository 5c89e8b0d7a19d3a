"""`cmjax bench fabric`: the fabric's all_to_all beside `lax.all_to_all`, and beside a plain memory copy.

Two jitted loops of chained exchanges, a short and a long one, run in turn; the median of their differences, divided by
what the long one has more, is what an exchange takes, and what is left of the short one is the launch of a program over
so many devices, of which a step needs one for all its exchanges. The loops' bodies hold two exchanges, so that XLA
copies no carry between iterations, for lax as for the fabric.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

from cmjax.bench.report import machine
from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS, fabric, virtual_devices
from cmjax.text import JsonObject

NUM_EXCHANGES = (20, 60)
SIDE_BY_SIDE = ((64, 300_000), (64, 34_000_000), (256, 300_000), (256, 34_000_000))
ALONE = ((320, 400_000), (320, 52_000_000), (384, 600_000), (384, 75_000_000))


@dataclasses.dataclass(frozen=True)
class FabricResult:
    """One payload. Times are seconds per exchange; NaN where lax cannot run."""

    num_ranks: int
    num_bytes: int  # all ranks together
    fabric_s: float
    lax_s: float
    memcpy_s: float  # the same bytes, copied by the fabric's threads
    launch_s: float  # of a program with the fabric's exchanges, once

    @property
    def speedup(self) -> float:
        return self.lax_s / self.fabric_s

    @property
    def memcpy_share(self) -> float:
        """The fabric's bandwidth as a share of a plain copy's."""
        return self.memcpy_s / self.fabric_s


@dataclasses.dataclass(frozen=True)
class OverlapResult:
    """A modelled delay beside work that lasts longer: seconds per step of all ranks, and the delay still visible."""

    work_s: float  # a step with the work alone
    modelled_s: float
    whole_s: float
    halves_s: float
    exposed_whole_s: float
    exposed_halves_s: float


def run(
    side_by_side: Sequence[tuple[int, int]] = SIDE_BY_SIDE,
    alone: Sequence[tuple[int, int]] = ALONE,
    *,
    repeats: int = 7,
    on_result: Callable[[FabricResult], None] | None = None,
) -> JsonObject:
    """Measures: `benchmark`, `machine`, `exchanges` and `overlap`, ready for JSON (NaN as None).

    Args:
      side_by_side: (ranks, bytes in all) to time with lax too; lax stops at 256 ranks.
      alone: (ranks, bytes in all) to time beside a memory copy only.
      repeats: timed runs of each loop; the median counts.
      on_result: called after each payload, for progress.
    """
    cases = [(*case, True) for case in side_by_side] + [(*case, False) for case in alone]
    virtual_devices(max((num_ranks for num_ranks, *_ in cases), default=8))
    form = fabric.status()["all_to_all"]
    if form.form != "fabric":
        raise UserError(f"bench fabric compares the C++ fabric with lax, but {form.reason}")
    results = []
    for num_ranks, num_bytes, with_lax in cases:
        results.append(_measure(num_ranks, num_bytes, with_lax, repeats))
        if on_result:
            on_result(results[-1])
    return {
        "benchmark": "fabric",
        "machine": machine(),
        "num_exchanges": list(NUM_EXCHANGES),
        "repeats": repeats,
        "exchanges": [_as_json(result) for result in results],
        "overlap": dataclasses.asdict(measure_overlap()),
    }


def measure_overlap(num_ranks: int = 8, num_steps: int = 10) -> OverlapResult:
    """How much of a modelled delay the whole call shows, and how much the two halves with the work in between."""

    def work(w: jax.Array, first: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 200, lambda _, w: jnp.tanh(w @ w), w + first)

    def alone(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x + 1, work(w, x[0, 0])

    def whole(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return fabric.all_to_all(x, EP_AXIS, 0, 0), work(w, x[0, 0])

    def halves(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = fabric.all_to_all_start(x, EP_AXIS, 0, 0)
        beside = work(fabric.after(token, w), x[0, 0])
        return fabric.all_to_all_done(x, token, hide_behind=beside), beside

    def step_s(ranks: int, body: Callable[..., tuple[jax.Array, jax.Array]]) -> float:
        def steps(x: jax.Array) -> jax.Array:
            start = x, jnp.full((96, 96), 0.01)
            x, w = lax.fori_loop(0, num_steps, lambda _, carry: body(*carry), start)
            return x + w[0, 0]

        loop, x = _loop(ranks, steps), _payload(ranks, 1)
        jax.block_until_ready(loop(x))
        fabric.traffic.reset()
        return statistics.median(_time(lambda: loop(x)) for _ in range(3)) / num_steps

    work_s = step_s(num_ranks, alone)
    modelled_s = 0.7 * step_s(1, alone)  # so that the last rank's work alone outlasts it
    measured = []
    fabric.configure(delay=fabric.DelayModel({"ub": modelled_s}, {"ub": math.inf}))
    try:
        for body in (whole, halves):
            seconds = step_s(num_ranks, body)
            (entry,) = fabric.traffic.snapshot().select("ub", "all_to_all")
            measured.append((seconds, entry.exposed_s / entry.calls))
    finally:
        fabric.configure(delay=None)
    (whole_s, exposed_whole_s), (halves_s, exposed_halves_s) = measured
    return OverlapResult(work_s, modelled_s, whole_s, halves_s, exposed_whole_s, exposed_halves_s)


def tables(report: JsonObject) -> list[Table]:
    """The report as tables for people."""
    host = report["machine"]
    title = f"all_to_all on {host['cpu']}, {host['cores']} cores, jax {host['jax']}, jaxlib {host['jaxlib']}"
    table = Table(title=title, caption=f"median of {report['repeats']} rounds; launch: once a program")
    for heading in (
        "ranks",
        "MB in all",
        "fabric ms",
        "lax ms",
        "lax / fabric",
        "copy ms",
        "share of copy",
        "launch ms",
    ):
        table.add_column(heading, justify="right")
    for row in report["exchanges"]:
        lax_ms, speedup = (
            ("-", "-") if row["lax_s"] is None else (f"{row['lax_s'] * 1e3:.1f}", f"{row['speedup']:.1f}x")
        )
        table.add_row(
            str(row["num_ranks"]),
            f"{row['num_bytes'] / 1e6:.1f}",
            f"{row['fabric_s'] * 1e3:.2f}",
            lax_ms,
            speedup,
            f"{row['memcpy_s'] * 1e3:.2f}",
            f"{row['memcpy_share']:.0%}",
            f"{row['launch_s'] * 1e3:.1f}",
        )
    overlap = report["overlap"]
    hidden = Table(title="a modelled delay beside work, ms per step")
    for heading in ("work alone", "modelled", "whole", "start/done", "visible, whole", "visible, start/done"):
        hidden.add_column(heading, justify="right")
    hidden.add_row(*(f"{value * 1e3:.2f}" for value in overlap.values()))
    return [table, hidden]


def _measure(num_ranks: int, num_bytes: int, with_lax: bool, repeats: int) -> FabricResult:
    width = max(1, round(num_bytes / (4 * num_ranks**2)))
    x = _payload(num_ranks, width)

    def chain(x: jax.Array, module: ModuleType, count: int) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: module.all_to_all(x, EP_AXIS, 0, 0), x, unroll=2)

    modules = {"fabric": fabric, "lax": lax} if with_lax else {"fabric": fabric}
    loops = {
        name: [_loop(num_ranks, functools.partial(chain, module=module, count=count)) for count in NUM_EXCHANGES]
        for name, module in modules.items()
    }
    for pair in loops.values():
        for loop in pair:
            jax.block_until_ready(loop(x))
    # Taken in turns, so that what else the machine does falls on all of them alike.
    seconds: dict[str, list[float]] = {"fabric": [], "lax": [], "memcpy": [], "launch": []}
    few, many = NUM_EXCHANGES
    for _ in range(repeats):
        for name, pair in loops.items():
            short, long = (_time(functools.partial(loop, x)) for loop in pair)
            seconds[name].append((long - short) / (many - few))
            if name == "fabric":
                seconds["launch"].append(short - few * seconds[name][-1])
        seconds["memcpy"].append(fabric.time_memcpy(x.nbytes))
    median = {name: statistics.median(values) if values else math.nan for name, values in seconds.items()}
    return FabricResult(
        num_ranks, x.nbytes, median["fabric"], median["lax"], median["memcpy"], max(median["launch"], 0.0)
    )


def _mesh(num_ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_ranks], dtype=object), (EP_AXIS,))


def _payload(num_ranks: int, width: int) -> jax.Array:
    data = np.arange(num_ranks**2 * width, dtype=np.float32).reshape(num_ranks**2, width)
    return jax.device_put(data, NamedSharding(_mesh(num_ranks), P(EP_AXIS)))


def _loop(num_ranks: int, fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    spec = P(EP_AXIS)
    return jax.jit(jax.shard_map(fn, mesh=_mesh(num_ranks), in_specs=spec, out_specs=spec, check_vma=False))


def _time(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def _as_json(result: FabricResult) -> JsonObject:
    values = dataclasses.asdict(result) | {"speedup": result.speedup, "memcpy_share": result.memcpy_share}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
