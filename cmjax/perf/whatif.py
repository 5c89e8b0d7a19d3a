"""What the discussion of the paper (section 6) would bring, by the same pricing; assumptions stand beside each table.

A what-if is `{"title", "assumptions", "columns", "rows", "plot": (x, [y, ...])}`; `rows` hold numbers or texts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.perf.hardware import Hardware, hardware
from cmjax.perf.layout import Layout, latent_bytes
from cmjax.perf.points import tokens_a_step
from cmjax.perf.price import NO_PRICING, StepPrice, memory_of, price, stage_parts
from cmjax.perf.work import ATTENTION_STREAM, MOE_STREAM
from cmjax.text import JsonObject

_TPOT_S, _CONTEXT, _ACCEPTANCE, _EP = 0.05, 4096, 0.7, 320
_BATCHES = tuple(range(4, 257, 4))
_ENDS = (16, 64)
Result = JsonObject


def run(name: str, config: ModelConfig, machine: Hardware) -> Result:
    """One of `WHAT_IFS`; UserError for another name."""
    if name not in WHAT_IFS:
        raise UserError(f"what-if {name!r} is unknown; there are {', '.join(WHAT_IFS)}")
    return WHAT_IFS[name](config, machine)


def _decode(config: ModelConfig, machine: Hardware, batch: int, **changes: Any) -> Layout:
    given: JsonObject = {
        "config": config, "phase": "decode", "ep_size": _EP, "batch": batch, "context": _CONTEXT,
        "drafts": _drafts(config), "balance": machine.balance,
    }  # fmt: skip
    return Layout(**{**given, **changes})


def _best(config: ModelConfig, machine: Hardware, **changes: Any) -> tuple[int, StepPrice] | None:
    """The largest batch of decode that keeps 50 ms, one or two microbatches, and its price."""
    found = None
    for batch in _BATCHES:
        for microbatches in (1, 2):
            layout = _decode(config, machine, batch, microbatches=microbatches, **changes)
            if sum(memory_of(layout).values()) > machine.memory_bytes:
                return found
            step = price(layout, machine, counted=layout.counts_by_batch(*_ENDS))
            if step.seconds / _tokens(config) <= _TPOT_S:
                found = (batch, step)
    return found


def _drafts(config: ModelConfig) -> int:
    """One, where the model has a module that drafts."""
    return min(1, config.num_mtp_layers)


def _tokens(config: ModelConfig) -> float:
    return tokens_a_step(_drafts(config), _ACCEPTANCE)


def _must_keep(config: ModelConfig, machine: Hardware) -> tuple[int, StepPrice]:
    """As `_best`; UserError where no batch fits and keeps the target."""
    found = _best(config, machine)
    if found is None:
        raise UserError(f"no batch of this model at EP{_EP} keeps {_TPOT_S * 1e3:g} ms on {machine.name}")
    return found


def _stages(layout: Layout, machine: Hardware, names: Iterable[str], tokens: int, rows: float | None = None) -> float:
    """Seconds of one MoE layer's stages for `tokens` tokens of a rank, on the whole machine."""
    data = layout.expected(tokens)
    if rows is not None:
        data = dataclasses.replace(data, rows=rows)
    counts = layout.counts()
    longest = max(stage.calls for stage in counts if stage.stage == "dispatch")
    return sum(
        stage_parts(stage, data, tokens, layout, machine, NO_PRICING).on(1)
        for stage in counts
        if stage.stage in names and stage.calls == longest
    )


def apart(config: ModelConfig, machine: Hardware) -> Result:
    """Attention and experts on dies of their own (MegaScale-Infer)."""
    if not config.moe_layer_ids:
        raise UserError("what-if 'afd' parts experts from attention, and this model has no experts")
    together = _must_keep(config, machine)
    rows = [["together", _EP, _EP, together[0], 1e3 * together[1].seconds / _tokens(config),
             together[0] * _tokens(config) / together[1].seconds]]  # fmt: skip
    exchange = ("dispatch", "combine")
    experts_only = [name for name in MOE_STREAM if name not in (*exchange, "gate")]
    num_layers = len(config.moe_layer_ids)
    for num_experts_dies in (32, 64, 96, 128, 160, 192):
        best = None
        dies = _EP - num_experts_dies
        for part in (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64):  # requests of a microbatch and an attention die
            layout = _decode(config, machine, part, ep_size=num_experts_dies)
            of_attention = _stages(layout, machine, (*ATTENTION_STREAM, "gate"), layout.tokens)
            # Each expert die serves several attention dies: so many more rows, its own layout's balance and placement.
            factor = dies / num_experts_dies
            expected = layout.expected(layout.tokens)
            of_experts = _stages(layout, machine, experts_only, layout.tokens, expected.rows * factor)
            of_exchange = _stages(layout, machine, exchange, max(1, round(layout.tokens * max(1, factor))))
            turn = max(of_attention, of_experts, of_exchange)
            outside = price(layout, machine)
            rest = outside.seconds - num_layers * outside.layer
            seconds = 3 * num_layers * turn + rest
            if seconds / _tokens(config) <= _TPOT_S:
                best = (3 * part, seconds, 3 * part * dies * _tokens(config) / seconds / _EP)
        if best is not None:
            rows.append(["apart", dies, num_experts_dies, best[0], 1e3 * best[1] / _tokens(config), best[2]])
    return {
        "title": f"Attention and experts on dies of their own, {_EP} dies in all, TPOT 50 ms",
        "assumptions": [
            "three microbatches take turns: one attends, one is with its experts, one travels; the slowest decides",
            "shared experts and redundant copies as the placement of the experts' dies has them; the exchange costs "
            "what it costs among the experts' dies",
            f"4,096 tokens of context, drafts: {_drafts(config)}, {_ACCEPTANCE:.0%} kept",
        ],
        "columns": ["form", "attention dies", "expert dies", "batch a die", "TPOT ms", "tok/s/die of all"],
        "rows": rows,
        "plot": ("expert dies", ["tok/s/die of all"]),
    }


def supernode(config: ModelConfig, machine: Hardware) -> Result:
    """Larger supernodes, and the 950 series."""
    rows = []
    for name in (machine.name, "ascend-950dt", "ascend-950pr"):
        one = hardware(name)
        for ep_size in (160, 320, 640, 1280):
            found = _best(config, one, ep_size=ep_size)
            if found is None:
                continue
            batch, step = found
            rate = batch * _tokens(config) / step.seconds
            instances = 8192 // ep_size
            rows.append(
                [name, ep_size, batch, 1e3 * step.seconds / _tokens(config), rate, rate * instances * ep_size / 1e6]
            )
    return {
        "title": "A supernode of 8,192 devices: decode at 50 ms by EP size, and on the 950 series",
        "assumptions": [
            "the exchange's figures end at EP256 and are held beyond it; on the 950 series UB's own rate and the 910's "
            "latencies serve",
            "efficiencies of the 950 series are the 910's; its figures are of a white paper",
            "all 8,192 devices decode; beyond 320 ranks more redundant experts fill the slots",
        ],
        "columns": ["machine", "EP", "batch", "TPOT ms", "tok/s/device", "million tok/s of 8,192"],
        "rows": rows,
        "plot": ("EP", ["tok/s/device"]),
    }


def plane(config: ModelConfig, machine: Hardware) -> Result:
    """One UB plane in place of three."""
    latents = _CONTEXT * latent_bytes(config)
    prefill = Layout(
        config=config, phase="prefill", ep_size=32, batch=8192, context=_CONTEXT, microbatches=2,
        balance=machine.balance,
    )  # fmt: skip
    step = price(prefill, machine, dataclasses.replace(NO_PRICING, check_memory=False))
    batch, decode = _must_keep(config, machine)
    rows = []
    for name, rate, shares in (
        ("three planes", machine.far_bytes_per_s, False),
        ("one UB plane", machine.link_bytes_per_s, True),
    ):
        # Each request arrives once for its output; its latents take a part of a die's UB from the exchange.
        arrivals = batch * _tokens(config) / decode.seconds / 256
        load = arrivals * latents / machine.link_bytes_per_s if shares else 0.0
        exchange = decode.stages["dispatch"] + decode.stages["combine"]
        slower = decode.seconds + exchange * load / (1 - load) / 2
        rows.append(
            [name, 1e3 * latents / rate, step.seconds + latents / rate, 100 * load, 1e3 * slower / _tokens(config)]
        )
    return {
        "title": "One UB plane in place of three: the hand-off of a prompt of 4,096 tokens, and what it costs decode",
        "assumptions": [
            "256 tokens of output a request; its latents go once to one die",
            "on one plane the exchange has what the hand-offs leave of a die's link; half of that is hidden behind the "
            "other microbatch",
        ],
        "columns": ["form", "hand-off ms", "step and hand-off s", "UB load %", "decode TPOT ms"],
        "rows": rows,
        "plot": ("form", ["hand-off ms"]),
    }


def pooling(config: ModelConfig, machine: Hardware) -> Result:
    """CPUs pooled apart from NPUs: how many sockets a die needs for cached prompts."""
    socket = 160e9
    rows = []
    for sockets_a_die in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0):
        rate = min(machine.host_bytes_per_s, socket * sockets_a_die)
        row: list[Any] = [sockets_a_die, rate / 1e9]
        for reuse in (0.5, 0.9):
            batch = max(2, round(8192 * (1 - reuse) / 2) * 2)
            layout = Layout(
                config=config, phase="prefill", ep_size=32, batch=batch, context=_CONTEXT, cached=_CONTEXT * reuse,
                microbatches=2, balance=machine.balance,
            )  # fmt: skip
            step = price(layout, machine, dataclasses.replace(NO_PRICING, check_memory=False)).seconds
            latents = 8192 * reuse * latent_bytes(config)
            row += [step, 1e3 * latents / rate]
        rows.append(row)
    return {
        "title": "CPUs pooled: sockets a die, and fetching the cached part of 8,192 tokens a die",
        "assumptions": [
            "160 GB/s of UB a CPU socket (facts 1.3), 0.25 sockets a die today; a die reads no faster than measured",
            "each die fetches its own part; what spreads it to the other ranks is in neither column",
        ],
        "columns": ["sockets a die", "GB/s a die", "step s, 50 %", "fetch ms, 50 %", "step s, 90 %", "fetch ms, 90 %"],
        "rows": rows,
        "plot": ("sockets a die", ["fetch ms, 50 %", "fetch ms, 90 %"]),
    }


def offload(config: ModelConfig, machine: Hardware) -> Result:
    """Core attention of decode partly on prefill's dies (Adrenaline)."""
    heads = (
        config.num_attention_heads * (config.latent_width + config.kv_lora_rank) * 2 * 2
    )  # queries there, results back
    num_layers = config.num_hidden_layers
    rows = []
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        best = None
        for batch in _BATCHES:
            layout = _decode(config, machine, batch)
            forms = [dataclasses.replace(layout, microbatches=count) for count in (1, 2)]
            free = dataclasses.replace(NO_PRICING, check_memory=False)
            priced = [price(one, machine, free, one.counts_by_batch(*_ENDS)) for one in forms]
            full = min(priced, key=lambda step: step.seconds)
            core = full.stages["core_attention"]
            busy = full.attention_share if full.streams[0] else 1.0
            travel = batch * share * heads / machine.link_bytes_per_s * num_layers
            away = core * share / busy
            seconds = full.seconds - away + max(0.0, travel - away)
            memory = memory_of(layout)
            fits = sum(memory.values()) - share * memory["cache"] <= machine.memory_bytes
            if fits and seconds / _tokens(config) <= _TPOT_S:
                best = (batch, seconds, core * share / seconds)
        if best is not None:
            batch, seconds, lent = best
            rows.append([100 * share, batch, 1e3 * seconds / _tokens(config), batch * _tokens(config) / seconds, lent])
    return {
        "title": "Decode's core attention partly on prefill's dies, TPOT 50 ms",
        "assumptions": [
            "the attention stream of figure 14 shortens by what leaves it; queries and results go over UB, hidden "
            "behind the rest",
            "a die of prefill attends as fast as one of decode; the last column is what it lends",
        ],
        "columns": ["offloaded %", "batch a die", "TPOT ms", "tok/s/die", "prefill dies a decode die"],
        "rows": rows,
        "plot": ("offloaded %", ["tok/s/die"]),
    }


WHAT_IFS: dict[str, Callable[[ModelConfig, Hardware], Result]] = {
    "afd": apart,
    "supernode": supernode,
    "plane": plane,
    "pooling": pooling,
    "offload": offload,
}


def shown(value: Any) -> str:
    """A cell of a what-if."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if math.isclose(value, round(value)) else f"{value:,.3g}"
