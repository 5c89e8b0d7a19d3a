"""`cmjax bench kernels`: decode and prefill on one device with the C++ kernels and without, in one run."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from cmjax import kernels
from cmjax.bench.peer import CONFIG, Sizes, decode_call, prefill_call
from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.kernels import KernelsMode
from cmjax.mesh import bring_up
from cmjax.model import Model, ModelConfig, convert_params, init_params, num_bytes, num_params, params_digest
from cmjax.quant import QuantMode
from cmjax.text import JsonObject

FORMATS = ("bfloat16", "float32", "int8")
MODES: tuple[KernelsMode, ...] = ("xla", "native")
DEFINITIONS = {
    "decode, prefill": "as in `cmjax bench peer`: greedy steps in one call, and one step over the prompts",
    "speedup": "the median over rounds of the time without kernels by the time with them, the two in turn",
    "int8": "weights of the large products in int8, activations in bfloat16",
}


def run(
    config: ModelConfig = CONFIG,
    *,
    formats: Sequence[str] = FORMATS,
    sizes: Sizes | None = None,
    rounds: int = 5,
    seed: int = 0,
    on_result: Callable[[JsonObject], None] | None = None,
) -> JsonObject:
    """Time decode and prefill of a random model with the kernels and with the XLA forms, in turn.

    Args:
        formats: of `FORMATS`.
        sizes: what is timed.
        rounds: timed runs of each.
        on_result: called with each row as it is ready.
    """
    sizes = sizes or Sizes()
    bring_up(1)
    before, floats = kernels.mode(), init_params(config, seed)
    results = []
    try:
        for name in formats:
            quant: QuantMode | None = "int8" if name == "int8" else None
            params = convert_params(floats, quant, jnp.dtype("bfloat16" if quant else name))
            model = Model(config, params, params_digest(config, params))
            jobs = [("decode", batch) for batch in sizes.decode_batches]
            for job, batch in [*jobs, ("prefill", sizes.prefill_batch)]:
                row = {"format": name, "job": job, "batch": batch, "bytes": num_bytes(params)}
                results.append(row | _measure(model, job, batch, sizes, rounds, seed))
                if on_result:
                    on_result(results[-1])
    finally:
        kernels.configure(before)
    return {
        "benchmark": "kernels",
        "machine": machine(),
        "kernels": dataclasses.asdict(kernels.status("cpu")["product"]),
        "settings": dataclasses.asdict(sizes) | {"rounds": rounds, "num_parameters": num_params(floats)},
        "results": results,
        "definitions": DEFINITIONS,
    }


def _measure(model: Model, job: str, batch: int, sizes: Sizes, rounds: int, seed: int) -> JsonObject:
    prompts = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, sizes.length))
    steps = sizes.num_steps if job == "decode" else 1
    calls: dict[str, Callable[[], object]] = {}
    for mode in MODES:
        kernels.configure(mode)
        calls[mode] = decode_call(model, prompts, steps) if job == "decode" else prefill_call(model, prompts)
    seconds = {mode: np.array(taken) / steps for mode, taken in in_turn(calls, rounds).items()}
    medians = {f"{mode}_s": float(np.median(taken)) for mode, taken in seconds.items()}
    return medians | {"speedup": float(np.median(seconds["xla"] / seconds["native"]))}


def tables(report: JsonObject) -> list[Table]:
    """Both forms of each step, and their ratio."""
    settings = report["settings"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, {settings['length']} tokens; "
        f"median of {settings['rounds']}"
    )
    table = new_table(title, "format", "job", "batch", "XLA ms", "kernels ms", "speedup", numbers_from=2)
    for row in report["results"]:
        times = [f"{row[f'{mode}_s'] * 1e3:.2f}" for mode in MODES]
        table.add_row(row["format"], row["job"], str(row["batch"]), *times, f"{row['speedup']:.2f}")
    return [define(table, report["definitions"] | {"the kernels": report["kernels"]["form"]})]
