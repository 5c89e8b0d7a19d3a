"""What a stage of a step asks of a device: operations by precision, bytes of memory, exchanges, operators to launch.

Numbers are expectations of one device and one call of the stage, as floats: operations, bytes, messages.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

Precision = Literal["int8", "bf16", "f32"]
# What a data-dependent loop runs over: keys of core attention, (query, key) pairs of it, rows of experts.
Unit = Literal["keys", "pairs", "rows"]

# The paper's two streams of a decode layer (figure 14), by the names that the scopes of the steps bear.
ATTENTION_STREAM = ("mla_prolog", "core_attention", "oproj")
MOE_STREAM = ("gate", "dispatch", "moe", "combine", "shared_expert")
OTHER_STAGES = ("embed", "mtp_input", "mlp", "lm_head", "sampling", "other")
STAGES = (*ATTENTION_STREAM, *MOE_STREAM, *OTHER_STAGES)


@dataclasses.dataclass(frozen=True)
class ExchangeWork:
    """One kind of exchange.

    Attributes:
        name: of the collective, such as "ragged_all_to_all".
        plane: the network.
        degree: ranks that take part.
        sent_bytes: that one rank sends to others.
        messages: that one rank sends.
    """

    name: str
    plane: str
    degree: int
    sent_bytes: float
    messages: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does.

    Attributes:
        int8, bf16, f32: operations (two a multiply-add) by the precision of the operands.
        weight_bytes: of parameters read.
        cache_bytes: of the latent cache read.
        activation_bytes: read and written by matrix operators, and by one vector operator between two of them.
        operators: matrix products and exchanges, each an operator to launch where it is not fused.
        exchanges: over the planes.
    """

    int8: float = 0
    bf16: float = 0
    f32: float = 0
    weight_bytes: float = 0
    cache_bytes: float = 0
    activation_bytes: float = 0
    operators: float = 0
    exchanges: tuple[ExchangeWork, ...] = ()

    def __add__(self, other: "Work") -> "Work":
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return Work(**sums, exchanges=(*self.exchanges, *other.exchanges))

    def times(self, factor: float) -> "Work":
        """`factor` times as much of everything; the number of exchanges stays."""
        scaled = {name: getattr(self, name) * factor for name in _SUMMED}
        exchanges = tuple(
            dataclasses.replace(one, sent_bytes=one.sent_bytes * factor, messages=one.messages * factor)
            for one in self.exchanges
        )
        return Work(**scaled, exchanges=exchanges)

    @property
    def flops(self) -> float:
        """Operations of all precisions."""
        return self.int8 + self.bf16 + self.f32

    @property
    def memory_bytes(self) -> float:
        """Bytes read from and written to the device's memory."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def sent_bytes(self) -> float:
        """Bytes sent to other ranks."""
        return sum(one.sent_bytes for one in self.exchanges)


def blend(low: Work, high: Work, share: float) -> Work:
    """`share` of the way from `low` to `high`, or beyond; both of one form."""
    values = {name: (1 - share) * getattr(low, name) + share * getattr(high, name) for name in _SUMMED}
    exchanges = tuple(
        dataclasses.replace(
            one,
            sent_bytes=(1 - share) * one.sent_bytes + share * two.sent_bytes,
            messages=(1 - share) * one.messages + share * two.messages,
        )
        for one, two in zip(low.exchanges, high.exchanges, strict=True)
    )
    return Work(**values, exchanges=exchanges)


_SUMMED = tuple(field.name for field in dataclasses.fields(Work) if field.name != "exchanges")


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    result = Work()
    for work in works:
        result = result + work
    return result


@dataclasses.dataclass(frozen=True)
class LoopWork:
    """A loop whose trips the data decides.

    Attributes:
        unit: what it runs over.
        per_unit: work of one, without weights.
        weights_once: bytes of the weights that each pass over the loop reads: of one expert, or of the layer.
        operators: of the whole loop, as one grouped product has them.
        trip: units of one trip.
    """

    unit: Unit
    per_unit: Work
    weights_once: float = 0
    operators: float = 0
    trip: float = 1


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the data is expected to be.

    Attributes:
        keys: tokens of context that a request's queries meet (decode), or all keys that a rank expands (prefill).
        pairs: of a query and a key that it sees, on one rank and of one microbatch (prefill).
        rows: that the busiest rank's experts receive from one dispatch.
        experts: of that rank that receive any.
    """

    keys: float = 0
    pairs: float = 0
    rows: float = 0
    experts: float = 0

    def of(self, unit: Unit) -> float:
        return float(getattr(self, unit))


@dataclasses.dataclass(frozen=True)
class StageWork:
    """A stage of one section of a step.

    Attributes:
        section: which scan or draft of the step it is in, by number.
        stage: one of `STAGES`.
        lane: "a" or "b", the microbatch; "" where there is one.
        calls: how often it runs in a step.
        fixed: work of a call that the data does not decide.
        loops: the rest.
    """

    section: int
    stage: str
    lane: str
    calls: int
    fixed: Work
    loops: tuple[LoopWork, ...] = ()

    def once(self) -> Work:
        """One call with one trip of each loop: what a compiler sees that does not know how often loops run."""
        trips = (loop.per_unit.times(loop.trip) + Work(weight_bytes=loop.weights_once) for loop in self.loops)
        return self.fixed + total(trips)

    def expected(self, data: Expected) -> Work:
        """The work of one call."""
        work = self.fixed
        for loop in self.loops:
            work = work + loop.per_unit.times(data.of(loop.unit))
            passes = data.experts if loop.unit == "rows" else 1
            work = work + Work(weight_bytes=loop.weights_once * passes, operators=loop.operators)
        return work


def blend_stages(low: list[StageWork], high: list[StageWork], share: float) -> list[StageWork]:
    """The stages of a step between two of equal form (or beyond them), by batch: all counts are affine in it."""
    result = []
    for one, two in zip(low, high, strict=True):
        loops = tuple(
            dataclasses.replace(a, per_unit=blend(a.per_unit, b.per_unit, share))
            for a, b in zip(one.loops, two.loops, strict=True)
        )
        result.append(dataclasses.replace(one, fixed=blend(one.fixed, two.fixed, share), loops=loops))
    return result
