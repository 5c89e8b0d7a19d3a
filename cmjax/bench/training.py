"""`cmjax bench training`: the routed experts' part of a training step on one device, by several forms.

All of them give the same values and gradients, which is checked before they are timed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.table import Table

from cmjax.bench.report import in_turn, machine
from cmjax.bench.tables import new_table
from cmjax.moe import MlpParams, RouterConfig, route
from cmjax.text import JsonObject
from cmjax.training import block_layout, expert_ffn_blocks

_ROWS_PER_BLOCK = (16, 32, 64, 128)
# (x, topk_idx, topk_weights, experts) -> float32[tokens, hidden]
Form = Callable[[jax.Array, jax.Array, jax.Array, MlpParams], jax.Array]


def _blocks(rows_per_block: int) -> Form:
    """Blocks of one expert each (`cmjax.training.experts`)."""

    def form(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, experts: MlpParams) -> jax.Array:
        layout = block_layout(topk_idx, experts.w13.shape[1], rows_per_block)
        return expert_ffn_blocks(x, topk_weights, layout, experts.w13[0], experts.w2[0])

    return form


def _ragged_dot(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, experts: MlpParams) -> jax.Array:
    """`lax.ragged_dot` over the rows sorted by expert."""
    tokens, num_topk = topk_idx.shape
    order = jnp.argsort(topk_idx.reshape(-1))
    counts = jnp.bincount(topk_idx.reshape(-1), length=experts.w13.shape[1])
    rows = x[order // num_topk]
    gate, up = jnp.split(lax.ragged_dot(rows, experts.w13[0].swapaxes(1, 2), counts), 2, axis=-1)
    y = lax.ragged_dot(jax.nn.silu(gate) * up, experts.w2[0].swapaxes(1, 2), counts)
    y = y * topk_weights.reshape(-1)[order][:, None]
    return jnp.zeros((tokens, x.shape[1])).at[order // num_topk].add(y)


def _dense(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, experts: MlpParams) -> jax.Array:
    """Every expert for every token, as one wide MLP whose hidden values are weighted, most of them by zero."""
    num_experts, width2, hidden = experts.w13.shape[1:]
    weights = jnp.zeros((x.shape[0], num_experts)).at[jnp.arange(x.shape[0])[:, None], topk_idx].set(topk_weights)
    gate_up = (x @ experts.w13[0].reshape(-1, hidden).T).reshape(-1, num_experts, width2)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    mixed = jax.nn.silu(gate) * up * weights[..., None]
    return mixed.reshape(x.shape[0], -1) @ experts.w2[0].swapaxes(1, 2).reshape(-1, hidden)


def run(
    *,
    tokens: int = 1024,
    hidden: int = 160,
    width: int = 12,
    num_experts: int = 256,
    num_topk: int = 8,
    rounds: int = 5,
    seed: int = 0,
) -> JsonObject:
    """Time value and gradient of one MoE layer's routed experts, in float32, each form in turn.

    Args:
        tokens: of a step.
        hidden, width: of the model, and of one expert.
        num_experts, num_topk: of the layer; random tokens choose them evenly.
        rounds: calls timed of each form; figures are medians.
        seed: of tokens and weights.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5)

    x = normal(tokens, hidden) * hidden**0.5
    experts = MlpParams(normal(1, num_experts, 2 * width, hidden), normal(1, num_experts, hidden, width))
    config = RouterConfig(num_experts=num_experts, num_topk=num_topk)
    topk_idx, topk_weights = route(x, normal(num_experts, hidden), None, config)
    target = normal(tokens, hidden)

    forms: dict[str, Form] = {f"blocks of {rows} rows": _blocks(rows) for rows in _ROWS_PER_BLOCK}
    forms |= {"lax.ragged_dot": _ragged_dot, "every expert for every token": _dense}
    results, calls = {}, {}
    for name, form in forms.items():

        def loss(x: jax.Array, weights: jax.Array, experts: MlpParams, form: Form = form) -> jax.Array:
            return jnp.sum(form(x, topk_idx, weights, experts) * target)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        results[name] = jax.tree.map(np.asarray, step(x, topk_weights, experts))
        calls[name] = lambda step=step: jax.block_until_ready(step(x, topk_weights, experts))
    reference = results["every expert for every token"]
    for name, found in results.items():
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
            scale = float(np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale, err_msg=name)
    seconds = in_turn(calls, rounds)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    best = min(medians.values())
    return {
        "machine": machine(),
        "shape": {
            "tokens": tokens,
            "hidden": hidden,
            "width": width,
            "num_experts": num_experts,
            "num_topk": num_topk,
        },
        "rounds": rounds,
        "results": [{"form": name, "seconds": s, "times_best": s / best} for name, s in medians.items()],
    }


def tables(report: JsonObject) -> list[Table]:
    """The forms with their times."""
    shape = report["shape"]
    title = (
        f"{shape['tokens']:,} tokens, {shape['num_experts']} experts of width {shape['width']}, forward and backward"
    )
    table = new_table(title, "form", "ms", "times the fastest", numbers_from=1)
    for row in report["results"]:
        table.add_row(row["form"], f"{row['seconds'] * 1e3:.0f}", f"{row['times_best']:.2f}")
    return [table]
