"""Rows of tokens around an exchange: their norm, their experts, packed to be sent, and where received ones lie."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.kernels.primitive import FLOATS, INLINE, Form, Result, make_primitive, run_kernel

Array = jax.Array
Scoring = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]
_INT32 = np.dtype(np.int32)
_NORM, _CHOOSE, _PACK, _LAY_OUT = (make_primitive(name) for name in ("norm", "choose", "pack", "lay_out"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How scores become choices.

    `noaux_tc` (V3): experts are ranked by score plus correction bias, a group by the sum of its two largest; the
    weights are the unbiased scores. `group_limited_greedy` (V2): a group is ranked by its largest score. `greedy` (V2):
    groups are ignored.
    """

    num_experts: int
    num_topk: int
    num_expert_groups: int = 1
    num_topk_groups: int = 1
    scoring: Scoring = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    @property
    def has_groups(self) -> bool:
        """Whether experts outside a token's best groups are left out."""
        return self.topk_method != "greedy" and self.num_expert_groups > 1


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def norm(form: Form, x: Array, weight: Array, spec: float) -> Array:
    """`x[rows, width]` by the root mean square of each row, times `weight[width]`, in the dtype of `x`.

    Args:
      form: the XLA form, `form(x, weight, spec=spec)`.
      spec: what is added to the mean square.
    """
    serves = x.dtype.name in FLOATS and weight.dtype.name in FLOATS and x.size > 0
    run = functools.partial(form, spec=spec)
    return run_kernel(_NORM, run, (x, weight), Result(x.shape, x.dtype), {"eps": float(spec)}, serves=serves)


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def choose(
    form: Form, logits: Array, is_valid: Array, expert_to_slot: Array, bias: Array | None, spec: RouterConfig
) -> tuple[Array, Array]:
    """Where tokens go, `int32[tokens, topk + shared]` (-1: nowhere), and how much that counts, float32.

    Args:
      form: the XLA form, `form(logits, is_valid, expert_to_slot, bias, spec=spec)`.
      logits: `float32[tokens, experts]`.
      is_valid: `bool[tokens]`; others go nowhere.
      expert_to_slot: `int32[experts + shared]`; those behind the routed experts get every token, with weight 1.
      bias: `float32[experts]` or None.
    """
    empty = jnp.zeros(0, jnp.float32)

    def run(logits: Array, is_valid: Array, expert_to_slot: Array, bias: Array) -> tuple[Array, Array]:
        return form(logits, is_valid, expert_to_slot, bias if bias.size else None, spec=spec)

    attributes = {
        "topk": spec.num_topk,
        "groups": spec.num_expert_groups if spec.has_groups else 1,
        "topk_groups": spec.num_topk_groups if spec.has_groups else 1,
        "is_softmax": spec.scoring == "softmax",
        "by_best_two": spec.topk_method == "noaux_tc",
        "is_normalized": spec.norm_topk_prob,
        "scale": float(spec.routed_scaling_factor),
    }
    arguments = (logits, is_valid, expert_to_slot, empty if bias is None else bias)
    serves = all(array.dtype == np.float32 for array in (logits, arguments[3])) and logits.size > 0
    serves &= expert_to_slot.dtype == np.int32 and is_valid.dtype == np.bool_
    shape = logits.shape[0], spec.num_topk + expert_to_slot.size - spec.num_experts
    results = Result(shape, _INT32), Result(shape, np.dtype(np.float32))
    return run_kernel(_CHOOSE, run, arguments, results, attributes, serves=serves)


@dataclasses.dataclass(frozen=True)
class PackSpec:
    """What is static about packed rows.

    Attributes:
        num_ranks, num_local: R ranks with e slots each.
        width: of a message.
        scale_at: where in a message the scale lies of rows that become int8, as `quant.quantize_rows` makes them; -1
            where they stay as they are.
    """

    num_ranks: int
    num_local: int
    width: int
    scale_at: int


@functools.partial(jax.jit, static_argnames=("form", "spec"), inline=INLINE)
def pack(form: Form, x: Array, slot_idx: Array, spec: PackSpec) -> tuple[Array, Array, Array, Array, Array]:
    """A row for each choice, sorted by the slot it goes to; those that go nowhere have none.

    Args:
      form: the XLA form, `form(x, slot_idx, spec=spec)`.
      x: `[tokens, hidden]`.
      slot_idx: `int32[tokens, topk]`, -1 for none.

    Returns:
      `(messages [tokens * topk, width], position int32[tokens, topk] among them or -1, offsets int32[R, e], counts
      int32[R, e], announced int32[R, 2, e])`, the last one being the two before it as each rank is told them. Messages
      beyond those of all slots are uninitialized.
    """
    run = functools.partial(form, spec=spec)
    is_int8 = spec.scale_at >= 0
    kinds = FLOATS if is_int8 else (*FLOATS, "int8")
    serves = x.dtype.name in kinds and slot_idx.dtype == np.int32 and x.size > 0
    by_rank = spec.num_ranks, spec.num_local
    results = (
        Result((slot_idx.size, spec.width), np.dtype(np.int8) if is_int8 else x.dtype),
        Result(slot_idx.shape, _INT32),
        Result(by_rank, _INT32),
        Result(by_rank, _INT32),
        Result((spec.num_ranks, 2, spec.num_local), _INT32),
    )
    return run_kernel(_PACK, run, (x, slot_idx), results, {"scale_at": spec.scale_at}, serves=serves)


@functools.partial(jax.jit, static_argnames="form", inline=INLINE)
def lay_out(form: Form, announced: Array) -> tuple[Array, Array, Array, Array]:
    """Where the rows that ranks have announced will lie, grouped by local expert.

    Args:
      form: the XLA form, `form(announced)`.
      announced: `int32[R, 2, e]`, what each rank sends to each expert here, and where it has these rows.

    Returns:
      `(counts, source_offsets, offsets: int32[R, e], rows of each expert: int32[e])`.
    """
    num_ranks, _, num_local = announced.shape
    by_rank = Result((num_ranks, num_local), _INT32)
    results = by_rank, by_rank, by_rank, Result((num_local,), _INT32)
    return run_kernel(_LAY_OUT, form, (announced,), results, {}, serves=announced.dtype == np.int32)
