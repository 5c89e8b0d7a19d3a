"""`cmjax simulate host`: what steps of virtual devices are predicted to take on this machine, and what they take.

The prediction is made from the compiled program and from costs of single operators, before the step runs; the step then
runs on random weights, as `cmjax compile --target here --run` does it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh
from rich.table import Table

from cmjax.bench.own_process import own_process
from cmjax.bench.report import machine
from cmjax.bench.tables import define, new_table
from cmjax.errors import UserError
from cmjax.mesh import EP_AXIS, bring_up
from cmjax.model import ModelConfig, head_shards
from cmjax.perf.host import HostCosts, price_program
from cmjax.perf.host_kernels import HostData
from cmjax.quant import QuantMode
from cmjax.serve import EngineSettings
from cmjax.serve.instances import AbstractInstance
from cmjax.targets.running import run_step
from cmjax.text import JsonObject

AIM = 0.2
GIB = 2**30
_BLOCK = 16
_LEAST_S = 0.3  # that calls are timed for
_CHUNK = 128  # keys of a trip in prefill, and queries of one
DEFINITIONS = {
    "predicted": "of the compiled program: its operators, kernels and exchanges by what each takes alone",
    "measured": "the median of calls on random weights; a decode call has several steps, and a share of its launch",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        role: "decode", or "prefill".
        ep_size: devices.
        batch: requests of a device, or tokens of a prefill step of all devices.
    """

    role: Literal["decode", "prefill"]
    ep_size: int
    batch: int


def run(
    config: ModelConfig,
    costs: HostCosts,
    cases: Sequence[Case],
    *,
    quant: QuantMode | None = None,
    num_steps: int = 4,
    rounds: int = 7,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> JsonObject:
    """Predict and measure each case, of a model whose large matrices are stored so; the report that JSON can hold."""
    results: dict[Case, JsonObject] = {}
    for ep_size in dict.fromkeys(case.ep_size for case in cases):
        own = [case for case in cases if case.ep_size == ep_size]
        tell(f"steps at EP{ep_size}", len(results), len(cases))
        # With threads for these devices and no more: those of others that sleep are slower to help.
        with own_process() as pool:
            found = pool.submit(_results, config, costs, own, quant, num_steps, rounds).result()
        results |= dict(zip(own, found, strict=True))
    errors = [abs(one["error"]) for one in results.values()]
    return {
        "benchmark": "host",
        "machine": machine(),
        "weights": quant or "bfloat16",
        "costs": costs.to_json(),
        "results": [results[case] for case in cases],
        "mean_absolute_error": sum(errors) / len(errors),
        "aim": AIM,
        "definitions": DEFINITIONS,
    }


def _results(
    config: ModelConfig,
    costs: HostCosts,
    cases: Sequence[Case],
    quant: QuantMode | None,
    num_steps: int,
    rounds: int,
) -> list[JsonObject]:
    """Of cases with the same devices, in a process of its own."""
    results = []
    for case in cases:
        instance = instance_of(config, case, num_steps, quant)
        _check_fits(instance, case)
        compiled = instance.trace().lower().compile()
        calls = num_steps if case.role == "decode" else 1
        stages = price_program(compiled.as_text(), costs, case.ep_size, data_of(instance), calls)
        stages = {name: seconds / calls for name, seconds in stages.items()}
        measured = run_step(instance, compiled, rounds)["run_median"]
        if measured * rounds < _LEAST_S:  # short of what a machine takes to warm up
            measured = run_step(instance, compiled, int(_LEAST_S / measured))["run_median"]
        measured /= calls
        predicted = sum(stages.values())
        results.append(
            {
                **dataclasses.asdict(case),
                "predicted_s": predicted,
                "measured_s": measured,
                "error": predicted / measured - 1,
                "stages_s": stages,
            }
        )
    return results


def kept(path: Path) -> HostCosts | None:
    """A calibration of this machine, these versions and this commit, or None."""
    try:
        costs = HostCosts.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return costs if costs.machine == machine() else None


def instance_of(config: ModelConfig, case: Case, num_steps: int, quant: QuantMode | None = None) -> AbstractInstance:
    """On the virtual devices that are here."""
    is_decode = case.role == "decode"
    settings = EngineSettings(
        max_model_len=min(256, config.max_position_embeddings),
        block_size=_BLOCK,
        max_num_seqs_per_rank=case.batch if is_decode else 2,
        max_num_batched_tokens=_BLOCK if is_decode else case.batch,
        steps_per_call=num_steps if is_decode else 1,
    )
    devices = bring_up(case.ep_size)
    if len(devices) < case.ep_size:
        raise UserError(f"EP {case.ep_size} needs {case.ep_size} devices, there are {len(devices)}")
    mesh = Mesh(np.array(devices[: case.ep_size], dtype=object), (EP_AXIS,))
    return AbstractInstance(case.role, config, settings, mesh, jnp.dtype(jnp.bfloat16), quant)


def _check_fits(instance: AbstractInstance, case: Case) -> None:
    """Before anything is drawn: every device has its own weights and cache."""
    needed = case.ep_size * (instance.local_bytes(instance.params) + instance.cache_bytes)
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{case.role} at EP{case.ep_size} needs {needed / GIB:.1f} GiB for weights and cache, of which "
            f"{free / GIB:.1f} are free on this machine; give a smaller --model or --ep"
        )


def data_of(instance: AbstractInstance) -> HostData:
    """What `run_step` gives it: sequences as long as may be, side by side; choices of experts spread evenly."""
    settings, placement = instance.settings, instance.placement
    tokens = instance.num_tokens // instance.ep_size
    rows = experts = 0.0
    if placement is not None:
        rows = float(tokens * (instance.config.num_topk + placement.num_dispatched_shared))
        local = placement.num_local_experts
        experts = local * -math.expm1(-rows / local)
    if instance.role == "decode":
        per_call = settings.steps_per_call * (1 + settings.num_speculative_tokens)
        return HostData(keys=settings.max_model_len - per_call / 2, rows=rows, experts=experts)
    return HostData(rows=rows, experts=experts, **_attended(instance))


def _attended(instance: AbstractInstance) -> dict[str, float]:
    """What `HostData` says of prefill's attention, on average over the groups of ranks that share out heads."""
    shards = head_shards(instance.config, instance.ep_size)
    length = min(instance.settings.max_model_len, instance.num_tokens)
    group = instance.num_tokens * shards // instance.ep_size
    tile, groups = min(_CHUNK, group), instance.num_tokens // group
    found = dict.fromkeys(("chunks", "tiles", "prompts", "prompt_keys", "pairs"), 0.0)
    for begin in range(0, instance.num_tokens, group):
        for first, count in _parts(begin, begin + group, length):
            last = -(-(first + count) // _CHUNK)
            found["chunks"] += last / groups
            met = (-(-count // tile) - max(chunk * _CHUNK - first, 0) // tile for chunk in range(last))
            found["tiles"] += sum(met) / groups
            found["prompts"] += 1 / groups
            found["prompt_keys"] += (first + count) / groups
            found["pairs"] += count * (first + (count + 1) / 2) / groups
    return found | {"tiles": found["tiles"] / max(found["chunks"], 1e-9)}


def _parts(begin: int, end: int, length: int) -> Iterator[tuple[int, int]]:
    """`(first position, tokens)` of each prompt among packed tokens."""
    while begin < end:
        count = min(length - begin % length, end - begin)
        yield begin % length, count
        begin += count


def tables(report: JsonObject) -> list[Table]:
    """Predicted beside measured."""
    host = report["machine"]
    table = new_table(
        f"Steps on {host['cpu']}, {host['cores']} cores",
        "step", "EP", "batch", "predicted ms", "measured ms", "error %", "most of it",
        numbers_from=1,
    )  # fmt: skip
    for row in report["results"]:
        most = sorted(row["stages_s"].items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {seconds / row['predicted_s']:.0%}" for name, seconds in most)
        times = (f"{row['predicted_s'] * 1e3:.2f}", f"{row['measured_s'] * 1e3:.2f}", f"{100 * row['error']:+.1f}")
        table.add_row(row["role"], str(row["ep_size"]), f"{row['batch']:,}", *times, parts)
    return [define(table, report["definitions"])]
