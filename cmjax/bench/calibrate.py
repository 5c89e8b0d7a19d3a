"""What this machine's operators take, measured one kind at a time: what `--hardware host` is priced with.

Nothing here runs a step of the engine, or knows one. Where N devices share the machine's cores, an operator is timed
between two exchanges, so that the devices take turns as they do in a step, and find their data where it then lies.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax.bench.calibrate_kernels import Probe, helped, mixed, probes
from cmjax.bench.calibrate_xla import chains
from cmjax.bench.report import machine
from cmjax.mesh import EP_AXIS, bring_up, fabric
from cmjax.model import rms_norm
from cmjax.perf.host import HostCosts, fit
from cmjax.perf.host_work import LAUNCHES, WAITS, HostData, total
from cmjax.quant import linear, matrix_at

Body = Callable[..., Any]  # (x, *others) -> x, on one device
# Devices that rates of shared cores are measured with: a few a core, and so many that no core's cache has their data.
FEW, CROWD = 8, 32
_ROUNDS = 2
_LEAST_S = 1e-9  # where noise would have a difference of times be none
_LAUNCH_ARGUMENTS = 64  # arrays that a step takes, about
_OWN_FLOATS = 2**17  # of a device
_PROBE_BYTES = 2**17
_WIDTH = 64  # of a row that is exchanged
_NO_DATA = HostData()


def calibrate(
    ranks: Sequence[int],
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
    *,
    passes: int = 3,
) -> HostCosts:
    """Measure; launches and exchanges of `ranks` devices each, and operators of one device, of few and of a crowd.

    All is measured `passes` times over: what slows a shared machine down for a while slows one of them.
    """
    costs = HostCosts(cores=int(machine()["cores"]), machine=machine())
    devices = bring_up(max(*ranks, CROWD))
    shared = [count for count in (FEW, CROWD) if count <= len(devices)]
    ranks = [count for count in sorted({1, FEW, *ranks}) if count <= len(devices)]  # costs of more are held
    todo: list[tuple[str, int, Callable[[_Devices, HostCosts], None]]] = [("a launch", one, _launch) for one in ranks]
    todo += [("exchanges", one, _exchanges) for one in ranks if one > 1]
    todo += [("XLA's operators", one, _operators) for one in (1, *shared)]
    todo += [("kernels", one, _kernels) for one in shared]
    todo += [("memory", one, _memory) for one in (1, *shared)]
    todo += [("all operators in a row", one, _in_a_row) for one in (1, *shared)]
    todo.append(("kernels that are helped", 1, _helped))
    places = [_Devices(devices[:count], costs.turns(count)) for _, count, _ in todo]
    for number in range(passes):
        costs = HostCosts(cores=costs.cores, machine=costs.machine)
        for index, (on, (what, count, measure)) in enumerate(zip(places, todo, strict=True)):
            tell(f"{what} of {count} devices", number * len(todo) + index, passes * len(todo))
            on.rewind()
            measure(on, costs)
    return costs


@dataclasses.dataclass
class _Timed:
    """A compiled loop, and what a trip of it took each time.

    Attributes:
        run: `(trips) -> seconds`.
        more: trips that are timed beyond the first.
        text: of the program.
        found: seconds of a trip, one of each pass.
    """

    run: Callable[[int], float]
    more: int
    text: str
    found: list[float] = dataclasses.field(default_factory=list)

    def seconds(self) -> float:
        """Of a trip, once more: launches are not in it. The median over passes."""
        several = [(self.run(1 + self.more) - self.run(1)) / self.more for _ in range(_ROUNDS)]
        self.found.append(max(min(several), _LEAST_S))
        return statistics.median_low(self.found)


class _Devices:
    """Runs loops of operators on some devices at once."""

    def __init__(self, devices: Sequence[jax.Device], turns: float) -> None:
        self.turns = turns  # that a core takes
        self.mesh = Mesh(np.array(devices, dtype=object), (EP_AXIS,))
        self.count = len(devices)
        self.turn = _in_turns(self.count)
        self._alone: dict[Any, tuple[float, str]] = {}
        self._programs: list[_Timed] = []
        self._next = 0

    def rewind(self) -> None:
        """What was timed is timed again, in the same order."""
        self._next = 0
        self._alone.clear()

    def put(self, local: np.ndarray) -> jax.Array:
        """The same array on each device."""
        whole = np.broadcast_to(local, (self.count, *local.shape)).reshape(-1, *local.shape[1:])
        return jax.device_put(whole, NamedSharding(self.mesh, P(EP_AXIS)))

    def jit(self, fn: Body, num_others: int) -> Any:
        """`fn(trips, x, *others)` on every device."""
        specs = (P(), *[P(EP_AXIS)] * (1 + num_others))
        mapped = jax.shard_map(fn, mesh=self.mesh, in_specs=specs, out_specs=P(EP_AXIS), check_vma=False)
        return jax.jit(mapped)

    def seconds(self, body: Body, x: np.ndarray, *others: np.ndarray, least_s: float = 4e-3) -> tuple[float, str]:
        """Of one turn of `body` on all devices together, and the compiled program; launches are not in it."""
        if self._next == len(self._programs):
            self._programs.append(self._timed(body, least_s, x, *others))
        timed, self._next = self._programs[self._next], self._next + 1
        return timed.seconds(), timed.text

    def _timed(self, body: Body, least_s: float, x: np.ndarray, *others: np.ndarray) -> _Timed:
        def loop(trips: jax.Array, x: jax.Array, *others: jax.Array) -> jax.Array:
            return lax.fori_loop(0, trips, lambda _, x: body(x, *others), x)

        arrays = [self.put(one) for one in (x, *others)]
        compiled = self.jit(loop, len(others)).lower(np.int32(1), *arrays).compile()

        def run(trips: int) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(np.int32(trips), *arrays))
            return time.perf_counter() - begin

        run(1)
        more = 4
        while (first := run(1 + more)) < least_s + (launch := run(1)) and more < 4096:
            more *= max(2, min(16, round(least_s / max(first - launch, 1e-6))))
        return _Timed(run, more, compiled.as_text())

    def between(
        self, body: Body, x: np.ndarray, *others: np.ndarray, data: HostData = _NO_DATA
    ) -> tuple[dict[str, float], float]:
        """`(amounts, seconds)` of a body on a device and its core, where each device then waits for the others."""
        turn, key = self.turn, (x.shape, x.dtype.name)
        if key not in self._alone:
            self._alone[key] = self.seconds(turn, x)
        alone, base = self._alone[key]
        found, text = self.seconds(lambda x, *others: turn(body(x, *others)), x, *others)
        amounts = _less(total(text, data), total(base, _NO_DATA))
        return amounts, max(found - alone, found / 16) / self.turns


def _less(amounts: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    found = {name: amount - base.get(name, 0.0) for name, amount in amounts.items()}
    return {name: amount for name, amount in found.items() if amount > 0}


def _in_turns(count: int) -> Body:
    """An exchange of next to nothing, which every device waits in; alone there is nobody to wait for.

    A kernel stands for it then: XLA makes one function of a small loop that has no call, where a step has operators.
    """
    if count == 1:
        unit = jnp.ones(1, jnp.float32)
        return lambda x: x + (rms_norm(x.reshape(-1)[:1].reshape(1, 1), unit, 1e-6)[0, 0] * 1e-9).astype(x.dtype)

    def turn(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1)[:1]
        sent = jnp.broadcast_to(flat.reshape(1, 1), (count, 1))
        return x + fabric.all_to_all(sent, EP_AXIS, 0, 0)[0, 0] * jnp.asarray(1e-9, x.dtype)

    return turn


def _put(costs: HostCosts, count: int, names: Sequence[str], measured: list[tuple[dict[str, float], float]]) -> None:
    """The costs `names` from what was measured, beside those that are known; others are taken for nothing."""
    rest = []
    for amounts, seconds in measured:
        known = {name: amount for name, amount in amounts.items() if count in costs.values.get(name, {})}
        left = max(seconds - costs.of(known, count), seconds / 8)
        rest.append(({name: amounts.get(name, 0.0) for name in names}, left))
    for name, value in fit(rest, names).items():
        costs.put(name, count, value)


def _operators(on: _Devices, costs: HostCosts) -> None:
    """XLA's own."""
    rng = np.random.default_rng(0)
    for names, family in chains():
        if 2 * on.count > costs.cores:  # nobody is waited for where no thread has nothing to do
            for name in set(names) & set(WAITS):
                costs.put(name, on.count, 0.0)
            names = tuple(name for name in names if name not in WAITS)
        _put(costs, on.count, names, [on.between(one.body, *one.make(rng)) for one in family])


def _kernels(on: _Devices, costs: HostCosts) -> None:
    for family in probes().values():
        measured = [_of_probe(on, one) for one in family]
        names = {name for amounts, _ in measured for name in amounts if on.count not in costs.values.get(name, {})}
        _put(costs, on.count, sorted(names), measured)


def _of_probe(on: _Devices, probe: Probe, pause: Body | None = None) -> tuple[dict[str, float], float]:
    rng = np.random.default_rng(0)
    made = [probe.make(rng)]
    size = len(made[0])
    repeats = max(1, min(probe.repeats, _PROBE_BYTES // sum(array.nbytes for array in made[0])))
    repeats = repeats if pause is None else probe.repeats
    made += [probe.make(rng) for _ in range(repeats - 1)]

    def body(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        first = []
        for repeat in range(repeats):
            # What depends on `x` stays in the loop.
            x = x if pause is None else pause(x)
            *own, _ = lax.optimization_barrier((*arrays[repeat * size : (repeat + 1) * size], x))
            first.append(probe.call(*own).reshape(-1)[:1].astype(jnp.float32))
            x = x if pause is None else x + first[-1] * 1e-20
        return x + sum(first) * 1e-20

    arrays = [array for one in made for array in one]
    x = np.zeros(1, np.float32)
    if pause is None:
        return on.between(body, x, *arrays, data=probe.data)

    def pauses(x: jax.Array) -> jax.Array:
        for _ in range(repeats):
            x = pause(x)
        return x

    alone, base = on.seconds(pauses, x)
    found, text = on.seconds(body, x, *arrays)
    amounts = _less(total(text, probe.data), total(base, _NO_DATA))
    return {name: amount / repeats for name, amount in amounts.items()}, max(found - alone, found / 16) / repeats


def _in_a_row(on: _Devices, costs: HostCosts) -> None:
    """What each takes more among others than where it is repeated, its code and data close by.

    The devices read so much of their own in between that little of it stays in the cache of a core that many share.
    """
    probe, small = mixed(), chains()[0][1][0]
    rng = np.random.default_rng(0)
    (x, *others), kernels, own = small.make(rng), probe.make(rng), np.ones(_OWN_FLOATS, np.float32)
    count = len(kernels)

    def alone(x: jax.Array, own: jax.Array, *arrays: jax.Array) -> jax.Array:
        own, x = lax.optimization_barrier((own, x))
        return on.turn(x + own.sum() * 1e-20)

    def among(x: jax.Array, own: jax.Array, *arrays: jax.Array) -> jax.Array:
        *given, x = lax.optimization_barrier((*arrays[:count], x))
        return alone(small.body(x + probe.call(*given) * 1e-20, *arrays[count:]), own)

    base, base_text = on.seconds(alone, x, own, *kernels, *others)
    found, text = on.seconds(among, x, own, *kernels, *others)
    amounts = _less(total(text, probe.data), total(base_text, _NO_DATA))
    operators = sum(amount for name, amount in amounts.items() if name in LAUNCHES)
    more = (found - base) / on.turns - costs.of(amounts, on.count)
    costs.put("among_others_s", on.count, max(more, 0.0) / operators)


def _helped(on: _Devices, costs: HostCosts) -> None:
    """Where other threads are asleep when they are called, as between the operators of a step."""

    def pause(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 10_000, lambda _, x: x * 0.9999 + 1e-20, on.turn(x))

    if 2 * on.count > costs.cores:
        return
    found = []
    for probe in helped():
        amounts, seconds = _of_probe(on, probe, pause)
        kernels = {name: amount for name, amount in amounts.items() if name.startswith("attend")}
        beside = {name: amount for name, amount in amounts.items() if name not in kernels}
        left = max(seconds - costs.of(beside, 1), seconds / 8)
        found.append((costs.of(kernels, FEW), left))
    costs.help = sorted(found)


def _exchanges(on: _Devices, costs: HostCosts) -> None:
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
    entry = max(entries - empty, _LEAST_S) / (count * (many - 1))
    sent = max(large - rows, _LEAST_S) / (count * (each - 1) * _WIDTH * 4)
    segment = max(rows - empty, _LEAST_S) / count - _WIDTH * 4 * sent
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


def _launch(on: _Devices, costs: HostCosts) -> None:
    """Of a program with as many arrays as a step has, which leaves them alone."""
    arrays = [on.put(np.ones((1, 8), np.float32)) for _ in range(_LAUNCH_ARGUMENTS)]
    fn = on.jit(lambda _, x, *others: x + sum(one[0, 0] for one in others), len(arrays) - 1)
    compiled = fn.lower(np.int32(0), *arrays).compile()
    found = []
    for _ in range(3 * _ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(np.int32(0), *arrays))
        found.append(time.perf_counter() - begin)
    costs.put("launch_s", on.count, statistics.median(found))


def _memory(on: _Devices, costs: HostCosts) -> None:
    """Of weights that are in no cache."""
    megabytes = max(2, 128 // on.count)
    cold = np.zeros((megabytes, 512, 1024), jnp.bfloat16)

    def layers(x: jax.Array, stack: jax.Array) -> jax.Array:
        return lax.fori_loop(0, stack.shape[0], lambda i, x: x + linear(x, matrix_at(stack, i))[:, :1], x)

    found, _ = on.seconds(layers, np.ones((1, 1024), jnp.bfloat16), cold)
    costs.put("memory_bytes_per_s", on.count, on.count * cold.nbytes / found)
