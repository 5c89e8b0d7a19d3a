"""Loops of operators that are timed on some devices at once, for `cmjax.bench.calibrate`."""

import dataclasses
import math
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

from cmjax.mesh import EP_AXIS, fabric
from cmjax.model import rms_norm
from cmjax.perf.host_kernels import HostData
from cmjax.perf.host_work import total

Body = Callable[..., Any]  # (x, *others) -> x, on one device
NO_DATA = HostData()
LEAST_S = 1e-9  # where noise would have a difference of times be none


@dataclasses.dataclass
class _Timed:
    """Something compiled, its amounts, about, and what it took each time."""

    once: Callable[[], float]
    amounts: Mapping[str, float]
    found: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median, as it is of a step's calls."""
        return max(statistics.median(self.found or [1.0]), LEAST_S)


@dataclasses.dataclass
class _Loop:
    """Times a trip of a loop, launches aside.

    Attributes:
        run: `(trips) -> seconds`.
        least_s: that the trips beyond the first shall take.
        more: such trips, once it is known how many.
    """

    run: Callable[[int], float]
    least_s: float
    more: int = 0

    def __call__(self) -> float:
        """Seconds of a trip."""
        if not self.more:
            return self._first()
        return (self.run(1 + self.more) - self.run(1)) / self.more

    def _first(self) -> float:
        self.run(1)
        launch, more = self.run(1), 1
        while (seconds := self.run(1 + more) - launch) < self.least_s and more < 4096:
            more = math.ceil(more * max(1.2, min(16.0, self.least_s / max(seconds, 1e-6))))
        self.more = more
        return seconds / more


class Devices:
    """Runs loops of operators on some devices at once: what is asked for is compiled first, timed by `time`, and known
    when it is asked for in the same order after `rewind`; until then all takes a second."""

    def __init__(self, devices: Sequence[jax.Device], turns: float) -> None:
        self.turns = turns  # that a core takes
        self.mesh = Mesh(np.array(devices, dtype=object), (EP_AXIS,))
        self.count = len(devices)
        self.turn = _in_turns(self.count)
        self._alone: dict[Any, tuple[float, Mapping[str, float]]] = {}
        self._programs: list[_Timed] = []
        self._next = 0

    def time(self) -> None:
        """Everything that was asked for, once more."""
        for one in self._programs:
            one.found.append(one.once())

    def rewind(self) -> None:
        """The same is asked for again."""
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

    def seconds(
        self, body: Body, x: np.ndarray, *others: np.ndarray, data: HostData = NO_DATA, least_s: float = 4e-3
    ) -> tuple[float, Mapping[str, float]]:
        """Of one turn of `body` on all devices together, and the amounts of the compiled program."""
        timed = self._asked(lambda: self._compiled(body, data, least_s, x, *others))
        return timed.seconds, timed.amounts

    def launch(self, num_arrays: int) -> float:
        """Seconds of a program with so many arrays, which leaves them alone."""
        return self._asked(lambda: self._launched(num_arrays)).seconds

    def _asked(self, make: Callable[[], _Timed]) -> _Timed:
        if self._next == len(self._programs):
            self._programs.append(make())
        self._next += 1
        return self._programs[self._next - 1]

    def _compiled(self, body: Body, data: HostData, least_s: float, x: np.ndarray, *others: np.ndarray) -> _Timed:
        def loop(trips: jax.Array, x: jax.Array, *others: jax.Array) -> jax.Array:
            return lax.fori_loop(0, trips, lambda _, x: body(x, *others), x)

        run, text = self._program(loop, [self.put(one) for one in (x, *others)])
        return _Timed(_Loop(run, least_s), total(text, data))

    def _launched(self, num_arrays: int) -> _Timed:
        arrays = [self.put(np.ones((1, 8), np.float32)) for _ in range(num_arrays)]
        run, _ = self._program(lambda _, x, *others: x + sum(one[0, 0] for one in others), arrays)
        run(0)
        return _Timed(lambda: statistics.median(run(0) for _ in range(3)), {})

    def _program(self, fn: Body, arrays: Sequence[jax.Array]) -> tuple[Callable[[int], float], str]:
        """`(trips) -> seconds` of `fn(trips, *arrays)`, and its text."""
        compiled = self.jit(fn, len(arrays) - 1).lower(np.int32(1), *arrays).compile()

        def run(trips: int) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(np.int32(trips), *arrays))
            return time.perf_counter() - begin

        return run, compiled.as_text()

    def between(
        self, body: Body, x: np.ndarray, *others: np.ndarray, data: HostData = NO_DATA
    ) -> tuple[dict[str, float], float]:
        """`(amounts, seconds)` of a body on a device and its core, where each device then waits for the others."""
        turn, key = self.turn, (x.shape, x.dtype.name)
        if key not in self._alone:
            self._alone[key] = self.seconds(turn, x)
        alone, base = self._alone[key]
        found, amounts = self.seconds(lambda x, *others: turn(body(x, *others)), x, *others, data=data)
        return less(amounts, base), max(found - alone, found / 16) / self.turns


def less(amounts: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
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
