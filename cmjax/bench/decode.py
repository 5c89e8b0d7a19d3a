"""`cmjax bench decode`: a decode step over hundreds of devices, where its time goes, and the same tokens on one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.table import Table

from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.errors import UserError
from cmjax.mesh import Instance, bring_up
from cmjax.model import Model
from cmjax.moe import DispatchHandle, Exchange, FabricExchange, ReceivedRows, WireDtype
from cmjax.schedule import SlotLoad, blocks_for
from cmjax.serve import DecodeExecutor, EngineSettings, PrefillExecutor, SamplingParams, StepSpec, decode
from cmjax.serve.instances.direct import Prefilled, fill, prefill_prompts, rows_in_order
from cmjax.serve.instances.executor import host_load
from cmjax.text import JsonObject

BOUND = 3.0  # times one device
WIRES: dict[str, WireDtype | None] = {"float": None, "int8": "int8"}
DEFINITIONS = {
    "step": "a call of N decode steps over N, its launch included; the median over the rounds, and below the median of "
    "the differences within a round",
    "launch": "time of a call extrapolated to 0 steps: t(1) - (t(N) - t(1)) / (N - 1)",
    "exchange": "what a step takes longer when each MoE layer does dispatch and combine twice, on the same rows: "
    "packing, unpacking and the weighted sum count, waiting for the slowest rank does not",
    "math": "the rest of a step",
    "one device": "the same sequences on one device of the same process, N steps a call, float, in turn with the rest",
}

_NUM_PROMPTS = (
    32  # distinct prompts that fill the cache; each sequence goes on from one of them with a token of its own
)
_BLOCK_SIZE = 16


def run(
    model: Model,
    *,
    ep_size: int = 320,
    seqs_per_rank: int = 8,
    cache_tokens: int = 128,
    num_steps: int = 4,
    rounds: int = 5,
    seed: int = 0,
) -> JsonObject:
    """Time decode over `ep_size` devices, with float and int8 dispatch, and the same sequences on one device.

    Args:
        seqs_per_rank: sequences of each rank.
        cache_tokens: tokens in the cache of each sequence when a call starts.
        num_steps: decode steps a call, at least 2.
        rounds: calls timed of each form, in turn; figures are medians.
    """
    if num_steps < 2:
        raise UserError(f"the number of steps is {num_steps}; at least 2 tell the launch from the steps")
    devices = bring_up(ep_size)
    if len(devices) < ep_size:
        raise UserError(f"EP {ep_size} needs {ep_size} devices, there are {len(devices)}")
    source = prefilled_prompts(model, devices[0], cache_tokens, seed)
    num_tokens = ep_size * seqs_per_rank
    many = Filled(model, devices[:ep_size], source, seqs_per_rank, num_steps, seed)
    one = Filled(model, devices[:1], source, num_tokens, num_steps, seed)

    calls: dict[str, Callable[[], object]] = {"one": one.caller(one.spec(None), num_steps)}
    for wire, dtype in WIRES.items():
        once, twice = many.spec(dtype), many.spec(dtype, twice=True)
        calls |= {f"{wire} {n}": many.caller(once, n) for n in (1, num_steps)}
        calls[f"{wire} twice"] = many.caller(twice, num_steps)
    seconds = in_turn(calls, rounds)
    one_step_s = float(np.median(seconds["one"])) / num_steps
    results = [_result(wire, seconds, num_steps, num_tokens) for wire in WIRES]
    reference = one.tokens(one.spec(None), num_steps)
    for result in results:
        same = many.tokens(many.spec(WIRES[result["wire"]]), num_steps)[0] == reference[0]
        result["first_tokens_equal_to_one_device"] = int(same.sum())
    return {
        "benchmark": "decode",
        "machine": machine(),
        "settings": {
            "ep_size": ep_size,
            "num_sequences": num_tokens,
            "cache_tokens": cache_tokens,
            "num_steps": num_steps,
            "rounds": rounds,
        },
        "results": results,
        "one_device": {"step_s": one_step_s, "tokens_per_s": num_tokens / one_step_s},
        "bound": BOUND,
        "busiest_expert_over_mean": many.imbalance(),
        "seconds_a_call": seconds,
        "definitions": DEFINITIONS,
    }


def _result(wire: str, seconds: dict[str, list[float]], num_steps: int, num_tokens: int) -> JsonObject:
    one_step, all_steps, twice = (np.array(seconds[f"{wire} {form}"]) for form in (1, num_steps, "twice"))
    step_s = float(np.median(all_steps)) / num_steps
    launch_s = float(np.median(one_step - (all_steps - one_step) / (num_steps - 1))) / num_steps
    exchange_s = float(np.median(twice - all_steps)) / num_steps
    # Noise can make a small part come out negative, or two parts together more than the whole.
    launch_s = min(max(launch_s, 0.0), step_s)
    exchange_s = min(max(exchange_s, 0.0), step_s - launch_s)
    parts = {"launch": launch_s, "exchange": exchange_s, "math": step_s - launch_s - exchange_s}
    return {
        "wire": wire,
        "step_s": step_s,
        "tokens_per_s": num_tokens / step_s,
        "times_one_device": float(np.median(all_steps / np.array(seconds["one"]))),
        "seconds": parts,
        "shares": {name: part / step_s for name, part in parts.items()},
    }


def prefilled_prompts(
    model: Model, device: jax.Device, cache_tokens: int, seed: int, num_prompts: int = _NUM_PROMPTS
) -> tuple[PrefillExecutor, list[Prefilled]]:
    """Random prompts after prefill on one device: real latents for every cache."""
    settings = EngineSettings(
        max_model_len=cache_tokens,
        max_num_seqs_per_rank=num_prompts,
        block_size=_BLOCK_SIZE,
        max_num_batched_tokens=num_prompts * cache_tokens,
    )
    blocks = num_prompts * blocks_for(cache_tokens, _BLOCK_SIZE)
    source = PrefillExecutor(model, Instance("prefill0", "prefill", (device,)), settings, blocks)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, model.config.vocab_size, (num_prompts, cache_tokens))
    return source, prefill_prompts(source, prompts.tolist())


class Filled:
    """A decode instance whose every place holds a sequence, all of one length, its latents handed over from prefill."""

    def __init__(
        self,
        model: Model,
        devices: list[jax.Device],
        prefilled: tuple[PrefillExecutor, list[Prefilled]],
        seqs_per_rank: int,
        num_steps: int,
        seed: int,
    ) -> None:
        source, prompts = prefilled
        length = len(prompts[0].prompt_ids)
        settings = EngineSettings(
            max_model_len=length + num_steps,
            max_num_seqs_per_rank=seqs_per_rank,
            block_size=_BLOCK_SIZE,
        )
        instance = Instance("decode0", "decode", tuple(devices))
        self.instance = DecodeExecutor(model, instance, settings, seqs_per_rank * settings.max_blocks)
        num_sequences = len(devices) * seqs_per_rank
        first_tokens = np.random.default_rng(seed + 1).integers(0, model.config.vocab_size, num_sequences)
        placed = [prompts[index % len(prompts)] for index in range(num_sequences)]
        sampling = SamplingParams(max_tokens=num_steps + 1)
        plan = fill(source, self.instance, placed, first_tokens.tolist(), sampling, num_steps)
        self.state = self.instance.enter(plan)
        self.places = plan.places[np.argsort(rows_in_order(num_sequences, len(devices)))]
        self.slot_load = SlotLoad()

    def spec(self, dispatch_dtype: WireDtype | None, *, twice: bool = False) -> StepSpec:
        """The instance's step with another exchange."""
        spec = self.instance.spec
        placement = self.instance.placement
        new: Exchange = FabricExchange(
            axis_name=spec.rank.axis_name,
            num_local_experts=placement.num_local_experts if placement else 1,
            dispatch_dtype=dispatch_dtype,
        )
        new = TwiceExchange(new) if twice else new
        return dataclasses.replace(spec, rank=dataclasses.replace(spec.rank, exchange=new))

    def caller(self, spec: StepSpec, num_steps: int) -> Callable[[], object]:
        """A call of `num_steps` steps that always starts from the same batch, and returns when it has ended."""
        return lambda: self.tokens(spec, num_steps)

    def tokens(self, spec: StepSpec, num_steps: int) -> np.ndarray:
        """`int32[steps, sequences]` of one call, the sequences in the order they were made."""
        inst = self.instance
        output = decode(inst.params, inst.expert_to_slot, inst.cache, self.state, spec=spec, num_steps=num_steps)
        inst.cache = output.cache
        self.slot_load.add(host_load(output.slot_load))
        return np.asarray(output.token_ids)[:, self.places]

    def imbalance(self) -> float:
        """Rows of the busiest routed expert over the mean, the worst MoE layer, over all the calls so far."""
        load = self.instance.logical_load(self.slot_load.take())
        load = load[load.sum(1) > 0]
        return float(np.max(load.max(axis=1) / load.mean(axis=1))) if len(load) else 1.0


@dataclasses.dataclass(frozen=True)
class TwiceExchange:
    """Each dispatch and combine of `once` twice in a row: the second waits for the first, and its result is used."""

    once: Exchange

    def dispatch(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> tuple[ReceivedRows, DispatchHandle]:
        """The second dispatch's result."""
        first, _ = self.once.dispatch(x, slot_idx, channel=f"{channel}/before")
        return self.once.dispatch(x, slot_idx + _zero_after(first.messages), channel=channel)

    def combine(self, rows: jax.Array, topk_weights: jax.Array, handle: DispatchHandle, *, channel: str) -> jax.Array:
        """The second combine's result."""
        first = self.once.combine(rows, topk_weights, handle, channel=f"{channel}/before")
        return self.once.combine(rows, topk_weights + _zero_after(first), handle, channel=channel)


def _zero_after(x: jax.Array) -> jax.Array:
    """`int32[]` 0 that exists only once `x` does: the smaller of 0 and one bit of it (XLA cannot tell)."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bit = lax.bitcast_convert_type(x.reshape(-1)[0], unsigned) & 1
    return jnp.minimum(bit.astype(jnp.int32), 0)


def tables(report: JsonObject) -> list[Table]:
    """Step times and shares of `cmjax bench decode`."""
    settings, one = report["settings"], report["one_device"]
    title = (
        f"A decode step of {settings['num_sequences']:,} sequences, {settings['cache_tokens']} tokens cached of each; "
        f"median of {settings['rounds']} calls of {settings['num_steps']} steps"
    )
    columns = ("devices", "wire", "ms a step", "tokens/s", "launch", "exchange", "math", "x one device")
    table = new_table(title, *columns, numbers_from=2)
    for row in report["results"]:
        shares = (f"{row['shares'][part]:.0%}" for part in ("launch", "exchange", "math"))
        figures = (f"{row['step_s'] * 1e3:.1f}", f"{row['tokens_per_s']:,.0f}", *shares)
        table.add_row(str(settings["ep_size"]), row["wire"], *figures, f"{row['times_one_device']:.2f}")
    figures = (f"{one['step_s'] * 1e3:.1f}", f"{one['tokens_per_s']:,.0f}", "", "", "")
    table.add_row("1", "", *figures, "1.00")
    notes = {
        f"first tokens, {row['wire']}": f"{row['first_tokens_equal_to_one_device']:,} of "
        f"{settings['num_sequences']:,} are those of one device"
        for row in report["results"]
    }
    notes["x one device"] = f"the bound is {report['bound']:g}"
    notes["load"] = f"the busiest expert had {report['busiest_expert_over_mean']:.1f} times the mean"
    return [define(table, report["definitions"] | notes)]
