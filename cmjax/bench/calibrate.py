"""What this machine's operators take, measured one kind at a time: what `--hardware host` is priced with.

Nothing here runs a step of the engine, or knows one. Where N devices share the machine's cores, an operator is timed
between two exchanges, so that the devices take turns as they do in a step, and find their data where it then lies.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.bench.calibrate_devices import LEAST_S, Body, Devices, less
from cmjax.bench.calibrate_kernels import Probe, helped, mixed, probes
from cmjax.bench.calibrate_xla import chains
from cmjax.bench.own_process import own_process
from cmjax.bench.report import machine
from cmjax.kernels import without_help
from cmjax.mesh import EP_AXIS, bring_up, fabric, num_cores
from cmjax.perf.host import READ_MIB, HostCosts, fit, read_rate
from cmjax.perf.host_work import LAUNCHES, WAITS
from cmjax.quant import LayerMatrix, linear

# Devices that rates of shared cores are measured with: a few a core, and so many that no core's cache has their data.
FEW, CROWD = 8, 32
_LAUNCH_ARGUMENTS = 64  # arrays that a step takes, about
_OWN_FLOATS = 2**17  # of a device
_PROBE_BYTES = 2**17
_CALLS = 4  # in a row, of kernels that are helped
_PAUSE = 100_000  # additions that each wait for the one before: longer than threads look for work before they sleep
_WIDTH = 64  # of a row that is exchanged


def calibrate(
    ranks: Sequence[int],
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
    *,
    passes: int = 3,
    few: int = FEW,
    crowd: int = CROWD,
) -> HostCosts:
    """Measure; launches and exchanges of `ranks` devices each, and operators of one device, of few and of a crowd.

    All is measured `passes` times over: what slows a shared machine down for a while slows one of them. One device and
    few are measured in processes that have no more: threads of others that sleep are slower to help. All processes
    compile at once, then they take turns to measure.
    """
    ranks = sorted({1, few, *ranks})
    alone = [_Part((one,), tuple(ranks), few, crowd) for one in (1, few)]
    parts = [*alone, _Part(tuple({crowd, *ranks} - {1, few}), tuple(ranks), few, crowd)]
    costs = HostCosts(cores=int(machine()["cores"]), machine=machine())
    total = 1 + passes * len(parts)
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(own_process()) for _ in parts]
        tell("compiling", 0, total)

        def measured() -> list[HostCosts]:
            begun = [pool.submit(_measure, part) for pool, part in zip(pools, parts, strict=True)]
            return [one.result() for one in begun]

        measured()
        for number in range(passes):
            for index, (pool, part) in enumerate(zip(pools, parts, strict=True)):
                tell(f"operators of {max(part.counts)} devices", 1 + number * len(parts) + index, total)
                pool.submit(_time, part).result()
        for found in measured():
            costs.help = found.help or costs.help
            for name, points in found.values.items():
                for count, value in points.items():
                    costs.put(name, count, value)
    return costs


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process measures: `counts` of devices, of which those of `ranks` have launches and exchanges."""

    counts: tuple[int, ...]
    ranks: tuple[int, ...]
    few: int
    crowd: int


def _measure(part: _Part) -> HostCosts:
    """In a process of its own: compile what there is to time; or the costs, once it was timed."""
    costs = HostCosts(cores=num_cores(), machine={})
    for on, measure in _places(part):
        on.rewind()
        measure(on, costs)
    return costs


def _time(part: _Part) -> None:
    for on, _ in _places(part):
        on.time()


@functools.cache
def _places(part: _Part) -> list[tuple[Devices, Callable[[Devices, HostCosts], None]]]:
    """What is measured, and on which devices: kept by the process."""
    operators = (1, part.few, part.crowd)
    todo: list[tuple[Callable[[Devices, HostCosts], None], Sequence[int]]] = [
        (_launch, part.ranks), (_exchanges, [one for one in part.ranks if one > 1]), (_operators, operators),
        (_kernels, operators), (_memory, operators), (_in_a_row, operators), (_helped, (1,)),
    ]  # fmt: skip
    devices, cores = bring_up(max(part.counts)), num_cores()
    return [
        (Devices(devices[:count], count / min(count, cores)), measure)
        for measure, counts in todo
        for count in counts
        if count in part.counts and count <= len(devices)  # costs of more are held
    ]


def _put(costs: HostCosts, count: int, names: Sequence[str], measured: list[tuple[dict[str, float], float]]) -> None:
    """The costs `names` from what was measured, beside those that are known; others are taken for nothing."""
    rest = []
    for amounts, seconds in measured:
        known = {name: amount for name, amount in amounts.items() if count in costs.values.get(name, {})}
        left = max(seconds - costs.of(known, count), seconds / 8)
        rest.append(({name: amounts.get(name, 0.0) for name in names}, left))
    for name, value in fit(rest, names).items():
        costs.put(name, count, value)


def _operators(on: Devices, costs: HostCosts) -> None:
    """XLA's own."""
    rng = _rng()
    for names, family in chains():
        if 2 * on.count > costs.cores:  # nobody is waited for where no thread has nothing to do
            for name in set(names) & set(WAITS):
                costs.put(name, on.count, 0.0)
            names = tuple(name for name in names if name not in WAITS)
        _put(costs, on.count, names, [on.between(one.body, *one.make(rng)) for one in family])


def _kernels(on: Devices, costs: HostCosts) -> None:
    for family in probes().values():
        with without_help():
            measured = [_of_probe(on, one) for one in family]
        names = {name for amounts, _ in measured for name in amounts if on.count not in costs.values.get(name, {})}
        _put(costs, on.count, sorted(names), measured)


def _of_probe(on: Devices, probe: Probe) -> tuple[dict[str, float], float]:
    repeats = max(1, min(probe.repeats, _PROBE_BYTES // sum(array.nbytes for array in probe.make(_rng()))))
    body, arrays = _repeated(probe, repeats, lambda x: x)
    return on.between(body, np.zeros(1, np.float32), *arrays, data=probe.data)


def _repeated(probe: Probe, repeats: int, before: Body) -> tuple[Body, list[np.ndarray]]:
    """Calls in a row, and their arrays; `before` each something is done."""
    rng = _rng()
    made = [probe.make(rng) for _ in range(repeats)]
    size = len(made[0])

    def body(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        for repeat in range(repeats):
            x = before(x)
            # What depends on `x` stays in the loop.
            *own, _ = lax.optimization_barrier((*arrays[repeat * size : (repeat + 1) * size], x))
            x = x + probe.call(*own).reshape(-1)[:1].astype(jnp.float32) * 1e-20
        return x

    return body, [array for one in made for array in one]


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _in_a_row(on: Devices, costs: HostCosts) -> None:
    """What each takes more among others than where it is repeated, its code and data close by.

    The devices read so much of their own in between that little of it stays in the cache of a core that many share.
    """
    probe, small, rng = mixed(), chains()[0][1][0], _rng()
    (x, *others), kernels, own = small.make(rng), probe.make(rng), np.ones(_OWN_FLOATS, np.float32)
    count = len(kernels)

    def alone(x: jax.Array, own: jax.Array, *arrays: jax.Array) -> jax.Array:
        own, x = lax.optimization_barrier((own, x))
        return on.turn(x + own.sum() * 1e-20)

    def among(x: jax.Array, own: jax.Array, *arrays: jax.Array) -> jax.Array:
        *given, x = lax.optimization_barrier((*arrays[:count], x))
        return alone(small.body(x + probe.call(*given) * 1e-20, *arrays[count:]), own)

    with without_help():
        base, beside = on.seconds(alone, x, own, *kernels, *others)
        found, amounts = on.seconds(among, x, own, *kernels, *others, data=probe.data)
    amounts = less(amounts, beside)
    operators = sum(amount for name, amount in amounts.items() if name in LAUNCHES)
    more = (found - base) / on.turns - costs.of(amounts, on.count)
    costs.put("among_others_s", on.count, max(more, 0.0) / operators)


def _helped(on: Devices, costs: HostCosts) -> None:
    """Where other threads are asleep when they are called, as between the operators of a step that call them."""

    def pause(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, _PAUSE, lambda _, x: x * 0.9999 + 1e-20, on.turn(x))

    def pauses(x: jax.Array) -> jax.Array:
        for _ in range(_CALLS):
            x = pause(x)
        return x

    if 2 * on.count > costs.cores:
        return
    x, found = np.zeros(1, np.float32), []
    base, _ = on.seconds(pauses, x)
    for probe in helped():
        body, arrays = _repeated(probe, _CALLS, pause)
        with without_help():
            alone, _ = on.seconds(body, x, *arrays)
        with_help, _ = on.seconds(body, x, *arrays)
        found.append((max(alone - base, alone / 16) / _CALLS, max(with_help - base, with_help / 16) / _CALLS))
    costs.help = sorted(found)


def _exchanges(on: Devices, costs: HostCosts) -> None:
    """Costs of a rank, as are those of operators: what all wait for, over their turns."""
    count, turns = on.count, on.turns
    x = np.ones(1, np.float32)
    between, _ = on.seconds(on.turn, x)
    small = np.ones((count, _WIDTH), np.float32)
    empty, _ = on.seconds(_ragged(count, 1, 0), small)
    many = 16
    entries, _ = on.seconds(_ragged(count, many, 0), small)
    rows, _ = on.seconds(_ragged(count, 1, 1), small)
    each = 8
    large, _ = on.seconds(_ragged(count, 1, each), np.ones((count * each, _WIDTH), np.float32))
    entry = max(entries - empty, LEAST_S) / (count * (many - 1))
    sent = max(large - rows, LEAST_S) / (count * (each - 1) * _WIDTH * 4)
    segment = max(rows - empty, LEAST_S) / count - _WIDTH * 4 * sent
    costs.put("exchange_s", count, between / turns)
    costs.put("ragged_s", count, max(empty - count * entry, empty / 4) / turns)
    costs.put("entry_s", count, entry / turns)
    costs.put("segment_s", count, max(segment, 0.0) / turns)
    costs.put("sent_byte_s", count, sent / turns)


def _ragged(count: int, updates: int, each: int) -> Body:
    """An exchange of equally many rows with each device, in the first of some updates."""

    def exchange(x: jax.Array) -> jax.Array:
        is_first = jnp.arange(count * updates, dtype=jnp.int32) % updates == 0
        sizes = jnp.where(is_first, each, 0).astype(jnp.int32)
        offsets = jnp.repeat(jnp.arange(count, dtype=jnp.int32) * each, updates)
        there = jnp.full(count * updates, each, jnp.int32) * lax.axis_index(EP_AXIS).astype(jnp.int32)
        buffer = fabric.empty(x.shape, x.dtype)
        received = fabric.ragged_all_to_all(x, buffer, offsets, sizes, there, sizes, axis_name=EP_AXIS)
        return received if each else x + received[0, 0] * 0

    return exchange


def _launch(on: Devices, costs: HostCosts) -> None:
    """Of a program with as many arrays as a step has."""
    costs.put("launch_s", on.count, on.launch(_LAUNCH_ARGUMENTS))


def _memory(on: Devices, costs: HostCosts) -> None:
    """Of weights that are read in turn, so many of all devices: in a cache that cores share, or in none."""
    for mib in READ_MIB:
        count = max(2, mib // on.count)
        stack = np.zeros((count, mib * 2**20 // (on.count * count * 2048), 1024), jnp.bfloat16)

        def layers(x: jax.Array, stack: jax.Array) -> jax.Array:
            return lax.fori_loop(0, stack.shape[0], lambda i, x: x + linear(x, LayerMatrix(stack, i))[:, :1], x)

        _, each = on.between(layers, np.ones((1, 1024), jnp.bfloat16), stack)
        costs.put(read_rate(mib), on.count, on.count * stack.nbytes / (each * on.turns))
