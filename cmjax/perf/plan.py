"""How to lay out a machine: EP sizes, batch, microbatches, drafts, formats, the share of prefill, decode and cache.

Every layout of decode and of prefill is priced (`cmjax.perf.price`), those that miss a target or the memory are
dropped, and the devices are dealt so that both phases serve as many requests a second.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal

from cmjax.errors import UserError
from cmjax.model import ModelConfig
from cmjax.perf.hardware import Hardware
from cmjax.perf.layout import Layout, latent_bytes
from cmjax.perf.points import tokens_a_step
from cmjax.perf.price import StepPrice, price
from cmjax.perf.workload import Workload
from cmjax.text import JsonObject

_EP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 288, 320)
_PREFILL_EP_SIZES = (1, 2, 4, 8, 16, 32, 64)
_BATCHES = (2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)
_QUANTS: tuple[Literal["int8"] | None, ...] = ("int8", None)
_STEP_TOKENS = (1024, 2048, 4096, 8192, 16384)
# Counts are traced at these two and affine in between and beyond.
_DECODE_ENDS, _PREFILL_ENDS = (16, 64), (2048, 8192)
_KEPT_S = 600.0  # how long the pool keeps latents
_NODE_DRAM_BYTES = 1e12  # of a node, for the pool: assumed, the paper does not say


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout of one phase that keeps its target.

    Attributes:
        layout: it.
        price: of its step.
        latency_s: TPOT, or TTFT.
        tokens_per_s: of one device: output tokens, or prompt tokens.
    """

    layout: Layout
    price: StepPrice
    latency_s: float
    tokens_per_s: float

    @property
    def row(self) -> JsonObject:
        """What a report shows."""
        layout = self.layout
        return {
            "ep": layout.ep_size,
            "batch": layout.batch,
            "microbatches": layout.microbatches,
            "drafts": layout.drafts,
            "quant": layout.quant or "none",
            "latency_ms": self.latency_s * 1e3,
            "tokens_per_s_per_device": self.tokens_per_s,
            "memory_gib": sum(self.price.memory.values()) / 2**30,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """The devices' shares, and what they serve.

    Attributes:
        prefill, decode: what each instance of the phase is.
        num_prefill, num_decode: instances.
        cache_nodes: nodes whose memory the pool needs.
        requests_per_s: of the whole.
    """

    prefill: Candidate
    decode: Candidate
    num_prefill: int
    num_decode: int
    cache_nodes: int
    requests_per_s: float

    @property
    def devices(self) -> int:
        return self.num_prefill * self.prefill.layout.ep_size + self.num_decode * self.decode.layout.ep_size


def search(
    config: ModelConfig,
    machine: Hardware,
    workload: Workload,
    tpot_s: float,
    ttft_s: float,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> JsonObject:
    """Search; returns `{"plan", "front", "prefill_front", "cost_per_million", "config"}`.

    Raises:
        UserError: nothing keeps the targets; it says how near it comes.
    """
    longest, length = config.max_position_embeddings, workload.input_len + workload.output_len
    if length > longest:
        raise UserError(
            f"--input-len {workload.input_len} and --output-len {workload.output_len} are {length} tokens; the model's "
            f"max_position_embeddings are {longest}"
        )
    decode = _candidates(config, machine, workload, "decode", tell)
    prefill = _candidates(config, machine, workload, "prefill", tell)
    best = _best_plan(_within(prefill, ttft_s, "--ttft"), _within(decode, tpot_s, "--tpot"), machine, workload)
    if best is None:
        raise UserError(
            f"--devices {workload.devices} hold no prefill and decode instance together that keep the targets"
        )
    tokens = best.requests_per_s * workload.output_len
    cost = None if workload.price is None else workload.price * workload.devices / 3600 / tokens * 1e6
    return {
        "plan": best,
        "front": pareto(decode),
        "prefill_front": pareto(prefill),
        "output_tokens_per_s": tokens,
        "cost_per_million": cost,
        "config": serve_config(best, workload, tpot_s),
    }


def _within(candidates: list[Candidate], limit: float, flag: str) -> list[Candidate]:
    kept = [one for one in candidates if one.latency_s <= limit]
    if not candidates:
        raise UserError("no layout of the model fits in the memory of these devices")
    if not kept:
        nearest = min(candidates, key=lambda one: one.latency_s)
        raise UserError(f"{flag} {limit * 1e3:g}ms cannot be kept; the nearest is {nearest.latency_s * 1e3:.1f}ms")
    return kept


def _candidates(
    config: ModelConfig,
    machine: Hardware,
    workload: Workload,
    phase: Literal["prefill", "decode"],
    tell: Callable[[str, int, int], None],
) -> list[Candidate]:
    forms = list(_forms(config, workload, phase))
    if not forms:
        raise UserError(f"--devices {workload.devices} is too few: prefill and decode need at least one each")
    found: list[Candidate] = []
    for index, (ep_size, microbatches, drafts, quant) in enumerate(forms):
        tell(phase, index, len(forms))
        make = functools.partial(
            Layout,
            config=config,
            phase=phase,
            ep_size=ep_size,
            drafts=drafts,
            microbatches=microbatches,
            quant=quant,
            balance=workload.balance or machine.balance,
        )
        found += _of_form(make, machine, workload, phase)
    tell(phase, len(forms), len(forms))
    return found


def _forms(
    config: ModelConfig, workload: Workload, phase: str
) -> Iterator[tuple[int, int, int, Literal["int8"] | None]]:
    sizes = {*(_EP_SIZES if phase == "decode" else _PREFILL_EP_SIZES)}
    if phase == "decode" and workload.devices < _EP_SIZES[-1]:
        sizes.add(workload.devices // 2)
    drafts = (0, 1) if phase == "decode" and config.num_mtp_layers else (0,)
    for ep_size in sorted(size for size in sizes if 0 < size < workload.devices):
        for microbatches in (1, 2):
            for k in drafts:
                for quant in _QUANTS:
                    yield ep_size, microbatches, k, quant


def _of_form(make: Callable[..., Layout], machine: Hardware, workload: Workload, phase: str) -> Iterator[Candidate]:
    """The batches of one form that fit."""
    is_decode = phase == "decode"
    ends = _DECODE_ENDS if is_decode else _PREFILL_ENDS
    for batch in _BATCHES if is_decode else _STEP_TOKENS:
        if is_decode:
            context = workload.input_len + workload.output_len / 2
            layout = make(batch=batch, context=context)
        else:
            layout = make(batch=batch, context=workload.input_len, cached=workload.input_len * workload.reuse)
            if batch * layout.ep_size < workload.input_len * (1 - workload.reuse):
                continue  # the prompt takes several steps
        needed = sum(layout.memory().values())
        if needed > machine.memory_bytes:
            return
        found = price(layout, machine, counted=layout.counts_by_batch(*ends))
        if is_decode:
            tokens = tokens_a_step(layout.drafts, workload.acceptance)
            yield Candidate(layout, found, found.seconds / tokens, batch * tokens / found.seconds)
        else:
            yield Candidate(layout, found, _ttft(layout, found, machine), batch / (1 - workload.reuse) / found.seconds)


def _ttft(layout: Layout, found: StepPrice, machine: Hardware) -> float:
    """Half a step of waiting on average, the step, and the hand-off of a prompt's latents over the slow plane."""
    latents = layout.context * latent_bytes(layout.config)
    return 1.5 * found.seconds + latents / machine.far_bytes_per_s


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in latency and in throughput, the quickest first."""
    front: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.latency_s, -one.tokens_per_s)):
        if not front or one.tokens_per_s > front[-1].tokens_per_s:
            front.append(one)
    return front


def _best_plan(prefill: list[Candidate], decode: list[Candidate], machine: Hardware, workload: Workload) -> Plan | None:
    """The deal of devices that serves most requests; of equals the one with fewer devices."""
    best: Plan | None = None
    for p in _fastest(prefill):
        for d in _fastest(decode):
            p_rate = p.tokens_per_s * p.layout.ep_size / workload.input_len
            d_rate = d.tokens_per_s * d.layout.ep_size / workload.output_len
            for num_decode in range(1, workload.devices // d.layout.ep_size + 1):
                left = workload.devices - num_decode * d.layout.ep_size
                num_prefill = min(left // p.layout.ep_size, math.ceil(num_decode * d_rate / p_rate))
                if num_prefill < 1:
                    continue
                rate = min(num_prefill * p_rate, num_decode * d_rate)
                plan = Plan(p, d, num_prefill, num_decode, _cache_nodes(p.layout, rate, workload), rate)
                is_better = best is None or (rate, -plan.devices) > (best.requests_per_s, -best.devices)
                if is_better:
                    best = plan
    return best


def _fastest(candidates: list[Candidate]) -> list[Candidate]:
    """The best of each EP size."""
    best: dict[int, Candidate] = {}
    for one in candidates:
        size = one.layout.ep_size
        if size not in best or one.tokens_per_s > best[size].tokens_per_s:
            best[size] = one
    return list(best.values())


def _cache_nodes(layout: Layout, requests_per_s: float, workload: Workload) -> int:
    if not workload.reuse:
        return 0
    latents = workload.input_len * latent_bytes(layout.config)
    return math.ceil(requests_per_s * latents * _KEPT_S / _NODE_DRAM_BYTES)


def serve_config(plan: Plan, workload: Workload, tpot_s: float) -> JsonObject:
    """What `cmjax serve --config` takes, to run the plan."""
    decode, prefill = plan.decode.layout, plan.prefill.layout
    return {
        "ep": decode.ep_size,
        "prefill-ep": prefill.ep_size,
        "prefill-instances": plan.num_prefill,
        "decode-instances": plan.num_decode,
        "max-num-seqs": decode.batch,
        "microbatches": decode.microbatches,
        "mtp": decode.drafts,
        "quant": decode.quant or "none",
        "max-model-len": workload.input_len + workload.output_len,
        "max-num-batched-tokens": prefill.batch * prefill.ep_size,
        "tpot-slo-ms": round(tpot_s * 1e3, 3),
    }
