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
from cmjax.perf.host_work import HostData, total

Body = Callable[..., Any]  # (x, *others) -> x, on one device
NO_DATA = HostData()
LEAST_S = 1e-9  # where noise would have a difference of times be none
ROUNDS = 2


@dataclasses.dataclass
class _Timed:
    """A compiled loop, and what a trip of it took each time.

    Attributes:
        run: `(trips) -> seconds`.
        least_s: that the trips beyond the first shall take.
        text: of the program.
        more: trips that are timed beyond the first, once it is known how many.
        found: seconds of a trip, so far.
    """

    run: Callable[[int], float]
    least_s: float
    text: str
    more: int = 0
    found: list[float] = dataclasses.field(default_factory=list)

    def seconds(self) -> float:
        """Of a trip, launches aside: the median of all that was found, as it is of a step's calls."""
        if not self.more:
            self.more = self._enough()
        self.found += [(self.run(1 + self.more) - self.run(1)) / self.more for _ in range(ROUNDS)]
        return max(statistics.median(self.found), LEAST_S)

    def _enough(self) -> int:
        self.run(1)
        more = 1
        while (first := self.run(1 + more)) < self.least_s + (launch := self.run(1)) and more < 4096:
            more = math.ceil(more * max(1.2, min(16.0, self.least_s / max(first - launch, 1e-6))))
        return more


class Devices:
    """Runs loops of operators on some devices at once.

    Attributes:
        is_timed: False while programs are only compiled, each of which then takes a second.
    """

    is_timed = True

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
            self._programs.append(self._compiled(body, least_s, x, *others))
        timed, self._next = self._programs[self._next], self._next + 1
        return timed.seconds() if self.is_timed else 1.0, timed.text

    def _compiled(self, body: Body, least_s: float, x: np.ndarray, *others: np.ndarray) -> _Timed:
        def loop(trips: jax.Array, x: jax.Array, *others: jax.Array) -> jax.Array:
            return lax.fori_loop(0, trips, lambda _, x: body(x, *others), x)

        arrays = [self.put(one) for one in (x, *others)]
        compiled = self.jit(loop, len(others)).lower(np.int32(1), *arrays).compile()

        def run(trips: int) -> float:
            begin = time.perf_counter()
            jax.block_until_ready(compiled(np.int32(trips), *arrays))
            return time.perf_counter() - begin

        return _Timed(run, least_s, compiled.as_text())

    def between(
        self, body: Body, x: np.ndarray, *others: np.ndarray, data: HostData = NO_DATA
    ) -> tuple[dict[str, float], float]:
        """`(amounts, seconds)` of a body on a device and its core, where each device then waits for the others."""
        turn, key = self.turn, (x.shape, x.dtype.name)
        if key not in self._alone:
            self._alone[key] = self.seconds(turn, x)
        alone, base = self._alone[key]
        found, text = self.seconds(lambda x, *others: turn(body(x, *others)), x, *others)
        amounts = less(total(text, data), total(base, NO_DATA))
        return amounts, max(found - alone, found / 16) / self.turns


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
