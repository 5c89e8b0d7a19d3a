"""`cmjax bench quant`: int8 against bfloat16 and float32: single products, and a whole prefill on one device."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from cmjax.bench.peer import prefill_call
from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import define, new_table
from cmjax.mesh import bring_up
from cmjax.model import Model, ModelConfig, Params, convert_params, init_params, num_bytes, num_params, params_digest
from cmjax.quant import linear, quantize
from cmjax.text import JsonObject

# Layers wide enough for the products to be most of the work, about 190 million parameters.
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=2048,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=3,
    num_attention_heads=16,
    q_lora_rank=768,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    moe_intermediate_size=1408,
    num_routed_experts=8,
    num_shared_experts=1,
    num_topk=3,
    num_expert_groups=1,
    num_topk_groups=1,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    max_position_embeddings=1024,
)
SHAPES = ((1024, 1024), (2048, 1024), (1024, 2816), (4096, 2048))  # [out, in]
ROWS = (1, 8, 32, 128, 512)
TOKENS, LENGTH = 2048, 256  # of a prefill, and of one of its prompts
FORMATS = ("int8", "bfloat16", "float32")
BOUNDS = {"prefill_speedup": 1.25, "kept": 0.7, "memory": 0.3}
DEFINITIONS = {
    "products": "linear(x, weight) with bfloat16 activations in int8 and bfloat16, float32 ones in float32; in int8 "
    "the rows are quantized within the time",
    "speedup": "the faster of bfloat16 and float32 over int8, medians of the rounds; below 1 int8 loses",
    "prefill": "one step over all prompts on one device that fills the cache; the int8 model's floats are bfloat16",
    "products' advantage": "the large products of that prefill alone, each at the rows that it sees, summed over the "
    "layers: the faster float format over int8",
    "kept": "speedup of the prefill over the products' advantage",
    "memory": "bytes of the int8 model's parameters over those of the float32 model's",
}


def run(
    config: ModelConfig = CONFIG,
    *,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    rows: Iterable[int] = ROWS,
    tokens: int = TOKENS,
    length: int = LENGTH,
    rounds: int = 5,
    seed: int = 0,
) -> JsonObject:
    """Time products and a prefill of a random model, the formats in turn.

    Args:
        config: of the model.
        shapes: `(out, in)` of the single products.
        rows: of each of them.
        tokens: of the prefill, in prompts of `length`.
        rounds: timed runs of each; figures are medians.
    """
    bring_up(1)
    rng = np.random.default_rng(seed)
    products = [
        {"out": out, "in": width, "rows": count} | _times(_product_calls(rng, out, width, count), rounds)
        for out, width in shapes
        for count in rows
    ]
    models = _models(config, seed)
    prompts = rng.integers(0, config.vocab_size, (tokens // length, length))
    prefill = _times({name: prefill_call(model, prompts) for name, model in models.items()}, rounds)
    own: list[JsonObject] = [
        {"out": out, "in": width, "rows": count, "times": times}
        | _times(_product_calls(rng, out, width, count), rounds)
        for (out, width, count), times in prefill_products(config, tokens).items()
    ]
    sums = {name: sum(row["times"] * row["seconds"][name] for row in own) for name in FORMATS}
    advantage = _speedup(sums)
    memory = num_bytes(models["int8"].params) / num_bytes(models["float32"].params)
    results = {"prefill_speedup": prefill["speedup"], "kept": prefill["speedup"] / advantage, "memory": memory}
    return {
        "benchmark": "quant",
        "machine": machine(),
        "settings": {
            "num_parameters": num_params(models["float32"].params),
            "tokens": tokens,
            "length": length,
            "rounds": rounds,
        },
        "products": products,
        "prefill": prefill,
        "prefill_products": {"each": own, "seconds": sums, "advantage": advantage},
        "results": results,
        "bounds": BOUNDS,
        "definitions": DEFINITIONS,
    }


def _models(config: ModelConfig, seed: int) -> dict[str, Model]:
    """One random model in every format."""
    floats = init_params(config, seed)
    params: dict[str, Params] = {
        "int8": convert_params(floats, "int8", jnp.bfloat16),
        "bfloat16": convert_params(floats, None, jnp.bfloat16),
        "float32": floats,
    }
    return {name: Model(config, params[name], params_digest(config, params[name])) for name in FORMATS}


def _product_calls(rng: np.random.Generator, out: int, width: int, rows: int) -> dict[str, Callable[[], object]]:
    """A call for each format: one product, begun and ended."""
    weight = rng.standard_normal((out, width), np.float32)
    x = rng.standard_normal((rows, width), np.float32)
    product = jax.jit(linear)
    operands: dict[str, tuple[object, object]] = {
        "int8": (jnp.asarray(x, jnp.bfloat16), jax.device_put(quantize(weight))),
        "bfloat16": (jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)),
        "float32": (jnp.asarray(x), jnp.asarray(weight)),
    }
    return {
        name: functools.partial(lambda *pair: product(*pair).block_until_ready(), *pair)
        for name, pair in operands.items()
    }


def _times(calls: dict[str, Callable[[], object]], rounds: int) -> JsonObject:
    seconds = {name: float(np.median(taken)) for name, taken in in_turn(calls, rounds).items()}
    return {"seconds": seconds, "speedup": _speedup(seconds)}


def _speedup(seconds: dict[str, float]) -> float:
    return min(seconds["bfloat16"], seconds["float32"]) / seconds["int8"]


def prefill_products(config: ModelConfig, tokens: int) -> dict[tuple[int, int, int], int]:
    """The large products of a prefill on one device: `(out, in, rows)` -> how many of them.

    Experts are taken to receive equally many rows, in blocks of at most 128.
    """
    c = config
    found: dict[tuple[int, int, int], int] = {}
    heads, layers = c.num_attention_heads, c.num_hidden_layers

    def add(out: int, width: int, rows: int, times: int) -> None:
        key = (out, width, rows)
        found[key] = found.get(key, 0) + times

    def add_mlp(width: int, rows: int, times: int) -> None:
        add(2 * width, c.hidden_size, rows, times)
        add(c.hidden_size, width, rows, times)

    if c.q_lora_rank:
        add(c.q_lora_rank, c.hidden_size, tokens, layers)
    add(heads * c.qk_head_dim, c.q_lora_rank or c.hidden_size, tokens, layers)
    add(c.latent_width, c.hidden_size, tokens, layers)
    add(c.hidden_size, heads * c.v_head_dim, tokens, layers)
    add_mlp(c.intermediate_size, tokens, len(c.dense_layer_ids))
    sparse = len(c.moe_layer_ids)
    if sparse and c.num_shared_experts:
        add_mlp(c.num_shared_experts * c.moe_intermediate_size, tokens, sparse)
    if sparse:
        rows = tokens * c.num_topk // c.num_routed_experts
        block = min(rows, 128)
        add_mlp(c.moe_intermediate_size, block, sparse * c.num_routed_experts * -(-rows // block))
    return found


def tables(report: JsonObject) -> list[Table]:
    """Products by shape and rows, the prefill, and the bounds."""
    columns = ("out x in", "rows", *(f"{name} ms" for name in FORMATS), "int8 speedup", "faster")

    def cells(row: JsonObject) -> list[str]:
        times = [f"{row['seconds'][name] * 1e3:.3f}" for name in FORMATS]
        fastest = min(row["seconds"], key=lambda name: row["seconds"][name])
        return [*times, f"{row['speedup']:.2f}", fastest]

    rounds = report["settings"]["rounds"]
    products = new_table(f"One product, activations quantized within it; median of {rounds}", *columns, numbers_from=1)
    for row in report["products"]:
        products.add_row(f"{row['out']} x {row['in']}", str(row["rows"]), *cells(row))
    settings, results, bounds = report["settings"], report["results"], report["bounds"]
    title = f"A model of {settings['num_parameters'] / 1e6:.0f} M parameters, {settings['tokens']:,} tokens"
    whole = new_table(title, "", *columns[2:], numbers_from=1)
    whole.add_row("prefill", *cells(report["prefill"]))
    alone = report["prefill_products"]
    whole.add_row("its products alone", *cells({"seconds": alone["seconds"], "speedup": alone["advantage"]}))
    notes = {
        "prefill": f"{results['prefill_speedup']:.2f} times the best float, the bound is {bounds['prefill_speedup']:g}",
        "kept": f"{results['kept']:.0%} of the products' advantage, the bound is {bounds['kept']:.0%}",
        "memory": f"{results['memory']:.3f} of float32, the bound is {bounds['memory']:g}",
    }
    return [products, define(whole, report["definitions"] | {f"measured, {k}": v for k, v in notes.items()})]
