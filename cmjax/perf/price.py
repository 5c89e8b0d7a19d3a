"""What a counted step costs on a machine: seconds by stage, two streams, and whether it fits.

A stage takes the longer of its operations and its bytes, each at the ceiling of the machine times the efficiency that
was published for such an operator; then the vector operators between its products, where they are not fused; its
exchanges; and the launch of its operators. Two microbatches run as the machine says: as two streams that share out the
cores (figure 14), or with the exchange of one behind the work of the other (figure 18).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from cmjax.errors import UserError
from cmjax.perf.hardware import Hardware
from cmjax.perf.layout import Layout
from cmjax.perf.work import MOE_STREAM, ExchangeWork, Expected, StageWork, Work

Format = Literal["int8", "fp8", "fp4", "bf16"]
Kernel = Literal["few", "many"]  # of dispatch and combine: for how many tokens it is made
_KERNELS: tuple[Kernel, ...] = ("few", "many")
_GIB = 2**30
# A row of 7,168 values for each of 8 choices: what the exchanges' tables were measured with.
_TABLE_CHOICES = 8
_TABLE_MESSAGE = {"dispatch": 7680, "combine": 14336}
# Tokens a rank from which the times of the kernels for many tokens are known; fewer take them as long as so many.
_LARGE_EXCHANGE = 1024
_LARGE_BYTES = 1e7  # bytes a rank from which another collective is limited by its rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pricing:
    """How a step is priced beyond its layout.

    Attributes:
        format: of the weights that the program has in int8: "fp8" costs the same bytes, at the peak for 8 bits; "fp4"
            puts experts, dense MLPs and the output projection at 4.5 bits (a scale for 16 values) and the peak for 4
            bits, the other projections of attention at bfloat16, as the published FP4 checkpoints are.
        cache_itemsize: bytes of a value of the cache; the program's 2, or 1 where cache and core attention are FP8.
        splits: shares of the cores that the attention stream may take; None: every whole number of cores.
        check_memory: refuse what does not fit.
    """

    format: Format = "int8"
    cache_itemsize: int = 2
    splits: Sequence[float] | None = None
    check_memory: bool = True


@dataclasses.dataclass(frozen=True)
class StepPrice:
    """What a step costs.

    Attributes:
        seconds: of the whole step.
        stages: stage -> seconds on the whole machine, summed over layers and microbatches, nothing overlapped.
        streams: seconds of the two streams (attention, MoE), or (work, exchange), of what two microbatches overlap.
        attention_share: of the cores, where two streams share them.
        layer: seconds of one MoE layer with all its microbatches.
        memory: what for -> bytes of a device.
        kernel: of dispatch and combine, the faster one.
    """

    seconds: float
    stages: Mapping[str, float]
    streams: tuple[float, float]
    attention_share: float
    layer: float
    memory: Mapping[str, float]
    kernel: Kernel


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Seconds of one call of a stage on the whole machine: what follows the share of cores, and what does not."""

    scaled: float
    exchange: float
    launch: float

    def on(self, share: float) -> float:
        return self.scaled / share + self.exchange + self.launch


NO_PRICING = Pricing()


def price(
    layout: Layout, machine: Hardware, pricing: Pricing = NO_PRICING, counted: Sequence[StageWork] | None = None
) -> StepPrice:
    """Price one step of `layout` on `machine`; UserError where it does not fit in memory.

    `counted`: the stages, where they are known already.
    """
    machine, memory = machine.among(layout.ep_size), memory_of(layout, pricing)
    if pricing.check_memory:
        check_fits(layout, machine, memory)
    stages = layout.counts() if counted is None else counted
    # The faster of two steps that both grow with the batch grows with it, wherever the kernels' times cross.
    steps = [_priced(layout, machine, pricing, stages, memory, kernel) for kernel in _KERNELS]
    return min(steps, key=lambda step: step.seconds)


def _priced(
    layout: Layout,
    machine: Hardware,
    pricing: Pricing,
    counted: Sequence[StageWork],
    memory: Mapping[str, float],
    kernel: Kernel,
) -> StepPrice:
    single: list[tuple[StageWork, _Parts]] = []
    lanes: list[tuple[StageWork, _Parts]] = []
    stages: dict[str, float] = {}
    for stage in counted:
        tokens = layout.tokens // (2 if stage.lane else 1)
        parts = stage_parts(stage, layout.expected(tokens), tokens, layout, machine, pricing, kernel)
        (lanes if stage.lane else single).append((stage, parts))
        stages[stage.stage] = stages.get(stage.stage, 0) + stage.calls * parts.on(1)
    seconds = sum(stage.calls * parts.on(1) for stage, parts in single) + machine.step_overhead_s
    num_layers = max((stage.calls for stage, _ in (lanes or single) if stage.stage == "dispatch"), default=1)
    streams, share = (0.0, 0.0), 1.0
    if lanes:
        streams, share = _overlapped(lanes, layout, machine, pricing)
        # One microbatch has nobody to run beside in the first and the last of all turns.
        total_layers = num_layers + 1
        overlapped = max(streams) + min(streams) / (2 * total_layers)
        if _overlap(layout, machine) == "none":
            overlapped = sum(streams)
        seconds += overlapped
        layer = overlapped / total_layers
    else:
        in_layer = [(s, p) for s, p in single if s.calls == num_layers]
        layer = sum(parts.on(1) for _, parts in in_layer)
    return StepPrice(seconds, stages, streams, share, layer, memory, kernel)


def _overlap(layout: Layout, machine: Hardware) -> str:
    return machine.decode_overlap if layout.phase == "decode" else machine.prefill_overlap


def _overlapped(
    lanes: list[tuple[StageWork, _Parts]], layout: Layout, machine: Hardware, pricing: Pricing
) -> tuple[tuple[float, float], float]:
    """Seconds of the two streams, and the attention stream's share of the cores."""
    if _overlap(layout, machine) != "cores":
        exchanging = [(s, p) for s, p in lanes if s.stage in ("dispatch", "combine")]
        share = 1.0 if layout.phase == "decode" else 1 - machine.bulk_cores / machine.cores
        work = sum(s.calls * p.on(share) for s, p in lanes if s.stage not in ("dispatch", "combine"))
        behind = sum(s.calls * p.on(1) for s, p in exchanging)
        if machine.bulk_cores:  # the exchange has cores of its own, which only send: rows are sorted by the others
            sorting = sum(s.calls * p.scaled for s, p in exchanging)
            work, behind = work + sorting / share, behind - sorting
        return (work, behind), 1.0

    def at(share: float) -> tuple[float, float]:
        moe = sum(s.calls * p.on(1 - share) for s, p in lanes if s.stage in MOE_STREAM)
        return sum(s.calls * p.on(share) for s, p in lanes if s.stage not in MOE_STREAM), moe

    splits = pricing.splits or [cores / machine.cores for cores in range(1, machine.cores)]
    best = min(splits, key=lambda share: max(at(share)))
    return at(best), best


def stage_parts(
    stage: StageWork,
    data: Expected,
    tokens: int,
    layout: Layout,
    machine: Hardware,
    pricing: Pricing,
    kernel: Kernel | None = None,
) -> _Parts:
    """One call of a stage on the whole machine, its `tokens` dispatched together, by `kernel` or the faster one."""
    if stage.stage in ("dispatch", "combine"):
        kernels = _KERNELS if kernel is None else (kernel,)
        found = [_exchange_parts(stage, stage.expected(data), tokens, machine, one) for one in kernels]
        return min(found, key=lambda parts: parts.on(1))
    work = stage.expected(data)
    name, fused = stage.stage, stage.stage in machine.fused
    weights, rates = _weights(name, pricing), {}
    is_core = name == "core_attention"
    efficiency = machine.attention_efficiency if is_core else machine.matmul_efficiency
    for precision in ("int8", "bf16", "f32"):
        counted = weights[1] if precision == "int8" else precision
        if is_core and pricing.cache_itemsize == 1:
            counted = "int8"
        rates[precision] = machine.peak(counted) * efficiency
    compute = sum(getattr(work, precision) / rate for precision, rate in rates.items())
    rate = machine.memory_bytes_per_s * machine.memory_efficiency
    matmul_rate = rate if is_core else machine.memory_bytes_per_s * machine.matmul_memory_efficiency
    cache = work.cache_bytes * pricing.cache_itemsize / 2
    # Half of the activations' bytes are those of vector operators; where not fused, they wait for the products.
    half = work.activation_bytes / 2
    read = work.weight_bytes * weights[0] + cache + half
    if fused:
        scaled = max(compute, read / matmul_rate + half / rate)
    else:
        scaled = max(compute, read / matmul_rate) + half / rate
    exchange = sum(_exchange(one, machine) for one in work.exchanges)
    launches = 1.0 if fused else work.operators
    return _Parts(scaled, exchange, launches * machine.launch_s)


def _weights(stage: str, pricing: Pricing) -> tuple[float, str]:
    """`(bytes over those of int8, precision)` of what the program has in int8."""
    if pricing.format != "fp4":
        return 1.0, "int8"
    if stage in ("moe", "mlp", "shared_expert", "oproj"):
        return 4.5 / 8, "fp4"
    return 2.0, "bf16"


def _exchange(one: ExchangeWork, machine: Hardware) -> float:
    """Seconds of one exchange that is neither dispatch nor combine."""
    rate = machine.link_rate(one.degree)
    if machine.bulk is not None and one.sent_bytes >= _LARGE_BYTES:
        # Nobody measured these; what kernels for many tokens reach among as many ranks holds for their bytes too.
        rate = min(
            rate,
            (machine.bulk_bytes_per_s("dispatch", one.degree) + machine.bulk_bytes_per_s("combine", one.degree)) / 2,
        )
    return machine.link_latency_s + one.sent_bytes / rate


def _exchange_parts(stage: StageWork, work: Work, tokens: int, machine: Hardware, kernel: Kernel) -> _Parts:
    """A dispatch or combine of the rows of `tokens` tokens."""
    seconds = 0.0
    scale = max(1.0, _LARGE_EXCHANGE / tokens) if kernel == "many" else 1.0
    for one in work.exchanges:
        if one.name == "ragged_all_to_all":  # counts and offsets are part of the one operator: in its latency
            seconds += _rows(stage.stage, one, tokens, machine, kernel) * scale
    # The published time of the operator for few tokens holds the sorting of rows as it sends them; others sort first.
    sorts = kernel == "many" or (machine.table is None and tokens >= _LARGE_EXCHANGE)
    moved = work.activation_bytes / (machine.memory_bytes_per_s * machine.memory_efficiency) * scale if sorts else 0.0
    latency = machine.dispatch_latency_s if stage.stage == "dispatch" else machine.combine_latency_s
    return _Parts(moved, latency * bool(seconds) + seconds, machine.launch_s)


def _rows(stage: str, one: ExchangeWork, tokens: int, machine: Hardware, kernel: Kernel) -> float:
    """Seconds beyond the latency that the rows of `tokens` tokens travel."""
    sent = one.sent_bytes
    if kernel == "many":
        if machine.bulk_once_per_node and one.degree > machine.devices_per_node:
            nodes = one.degree / machine.devices_per_node
            choices = one.messages / tokens
            sent *= nodes * (1 - (1 - 1 / nodes) ** choices) / choices
        return sent / machine.bulk_bytes_per_s(stage, one.degree)
    if machine.table is None:
        return machine.exchange_slowdown * sent / machine.link_rate(one.degree)
    table = machine.table
    latency = machine.dispatch_latency_s if stage == "dispatch" else machine.combine_latency_s
    rate = table.tokens * _TABLE_CHOICES * _TABLE_MESSAGE[stage] / max(table.seconds(stage, one.degree) - latency, 1e-9)
    return machine.exchange_slowdown * sent / rate


def memory_of(layout: Layout, pricing: Pricing = NO_PRICING) -> dict[str, float]:
    """Bytes that a device needs, by what for."""
    memory = layout.memory()
    memory["cache"] *= pricing.cache_itemsize / 2
    if pricing.format == "fp4":
        memory["weights"] *= 0.6  # experts at 4.5 bits, attention and head at 16
    return memory


def check_fits(layout: Layout, machine: Hardware, memory: Mapping[str, float]) -> None:
    """UserError that names what does not fit, and by how much."""
    needed = sum(memory.values())
    if needed <= machine.memory_bytes:
        return
    parts = ", ".join(f"{name} {num_bytes / _GIB:.1f}" for name, num_bytes in memory.items())
    largest = max(memory, key=lambda name: memory[name])
    raise UserError(
        f"{layout.phase} at EP{layout.ep_size}, batch {layout.batch}, context {layout.context:g} needs "
        f"{needed / _GIB:.1f} GiB of a device ({parts}; the most by {largest}), {machine.name} has "
        f"{machine.memory_bytes / _GIB:.1f}"
    )


def stage_table(
    layout: Layout, machine: Hardware, step: StepPrice, pricing: Pricing = NO_PRICING
) -> list[dict[str, float | str]]:
    """Counts and seconds of each stage of a whole step, which has been priced: what a report shows."""
    rows: dict[str, dict[str, float | str]] = {}
    machine = machine.among(layout.ep_size)
    for stage in layout.counts():
        tokens = layout.tokens // (2 if stage.lane else 1)
        data = layout.expected(tokens)
        work: Work = stage.expected(data).times(stage.calls)
        seconds = stage.calls * stage_parts(stage, data, tokens, layout, machine, pricing, step.kernel).on(1)
        row = rows.setdefault(stage.stage, {"stage": stage.stage})
        for name, value in (
            ("int8_flops", work.int8),
            ("bf16_flops", work.bf16),
            ("f32_flops", work.f32),
            ("weight_bytes", work.weight_bytes),
            ("cache_bytes", work.cache_bytes),
            ("activation_bytes", work.activation_bytes),
            ("sent_bytes", work.sent_bytes),
            ("messages", sum(one.messages for one in work.exchanges)),
            ("operators", stage.calls if stage.stage in machine.fused else work.operators),
            ("seconds", seconds),
        ):
            row[name] = float(row.get(name, 0)) + value
    return list(rows.values())
