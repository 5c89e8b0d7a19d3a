"""`cmjax bench kernels`: decode and prefill on one device with and without the C++ kernels, in each format, in turn."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from cmjax import kernels
from cmjax.bench.peer import CONFIG, Sizes, decode_call, prefill_call
from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.kernels import KernelsMode
from cmjax.mesh import bring_up
from cmjax.model import Model, ModelConfig, Params, convert_params, init_params, num_bytes, num_params, params_digest
from cmjax.quant import QuantMode
from cmjax.text import JsonObject

FORMATS = ("bfloat16", "float32", "int8")
REFERENCE = "bfloat16"  # what the others are set beside
MODES: tuple[KernelsMode, ...] = ("xla", "native")
DEFINITIONS = {
    "decode, prefill": "as in `cmjax bench peer`: greedy steps in one call, and one step over the prompts",
    "speedup": "the median over rounds of the time without kernels by the time with them, the two in turn",
    "by bf16": "the same of bfloat16's time by this format's, both with the kernels, in turn as well",
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
    models = {name: _converted(config, floats, name) for name in formats}
    results = []
    try:
        jobs = [("decode", batch) for batch in sizes.decode_batches]
        for job, batch in [*jobs, ("prefill", sizes.prefill_batch)]:
            for row in _measure(models, job, batch, sizes, rounds, seed):
                results.append(row)
                if on_result:
                    on_result(row)
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


def _converted(config: ModelConfig, floats: Params, name: str) -> Model:
    quant: QuantMode | None = "int8" if name == "int8" else None
    params = convert_params(floats, quant, jnp.dtype("bfloat16" if quant else name))
    return Model(config, params, params_digest(config, params))


def _measure(
    models: Mapping[str, Model], job: str, batch: int, sizes: Sizes, rounds: int, seed: int
) -> Iterator[JsonObject]:
    """A row of each format, all forms of all of them in turn."""
    steps = sizes.num_steps if job == "decode" else 1
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        prompts = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, sizes.length))
        for mode in MODES:
            kernels.configure(mode)
            calls[f"{name}/{mode}"] = (
                decode_call(model, prompts, steps) if job == "decode" else prefill_call(model, prompts)
            )
    seconds = {call: np.array(taken) / steps for call, taken in in_turn(calls, rounds).items()}
    for name, model in models.items():
        own, beside = seconds[f"{name}/native"], seconds.get(f"{REFERENCE}/native")
        yield {
            "format": name,
            "job": job,
            "batch": batch,
            "bytes": num_bytes(model.params),
            **{f"{mode}_s": float(np.median(seconds[f"{name}/{mode}"])) for mode in MODES},
            "speedup": float(np.median(seconds[f"{name}/xla"] / own)),
            "by_bfloat16": None if beside is None else float(np.median(beside / own)),
        }


def tables(report: JsonObject) -> list[Table]:
    """Both forms of each step, and their ratio."""
    settings = report["settings"]
    title = (
        f"{settings['num_parameters'] / 1e6:.0f} M parameters on one device, {settings['length']} tokens; "
        f"median of {settings['rounds']}"
    )
    table = new_table(title, "format", "job", "batch", "XLA ms", "kernels ms", "speedup", "by bf16", numbers_from=2)
    for row in report["results"]:
        times = [f"{row[f'{mode}_s'] * 1e3:.2f}" for mode in MODES]
        beside = "" if row["by_bfloat16"] is None else f"{row['by_bfloat16']:.2f}"
        table.add_row(row["format"], row["job"], str(row["batch"]), *times, f"{row['speedup']:.2f}", beside)
    return [define(table, report["definitions"] | {"the kernels": report["kernels"]["form"]})]
