"""Dispatch and combine: token rows to the ranks of their physical experts, and the experts' outputs back.

The paper's FusedDispatch and FusedCombine (section 3). Counts travel first, then only the rows that exist, each written
straight to its final place: the receiver lays its buffer out grouped by local expert and tells every source where its
rows go. The buffers have the static worst-case sizes of equations 1 and 2, so nothing is ever dropped; pages that no
row touches cost nothing. Both exchanges have the fabric's two halves; the whole forms are the two in a row.

Everything here runs inside `jax.shard_map` over `axis_name`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from cmjax.kernels import PackSpec, lay_out, pack
from cmjax.mesh import fabric
from cmjax.moe.exchange import ReceivedRows, SplitExchange
from cmjax.moe.wire import WireDtype, check_wire_dtype, pack_rows, padded_row, scale_slot_bytes


def max_tokens(local_batch: int, num_topk: int, num_local_experts: int) -> int:
    """Most rows one rank may send to one peer (paper equation 2)."""
    return local_batch * min(num_topk, num_local_experts)


def buffer_bytes(ep_size: int, local_batch: int, num_topk: int, num_local_experts: int, message_bytes: int) -> int:
    """Size of a rank's dispatch (or combine) buffer (paper equation 1).

    The paper's example, 320 ranks of 96 tokens with one expert each: 225 MiB for dispatch messages of 7.5 KiB and
    420 MiB for combine messages of 14 KiB.
    """
    return ep_size * max_tokens(local_batch, num_topk, num_local_experts) * message_bytes


@flax.struct.dataclass
class DispatchHandle:
    """What `combine` needs to undo a dispatch. R ranks, e local experts; "segment (r, j)": rows of one peer and expert.

    Attributes:
        choice_pos: `int32[tokens, topk]`: where each choice stands in the source's packed rows, -1 for none.
        send_offsets, send_counts: `int32[R, e]`: my segment for local expert j of rank r, in packed rows.
        recv_offsets, recv_counts: `int32[R, e]`: what rank r sent my expert j, in the receive buffer.
        source_offsets: `int32[R, e]`: where that segment stands in rank r's packed rows.
    """

    choice_pos: jax.Array
    send_offsets: jax.Array
    send_counts: jax.Array
    recv_offsets: jax.Array
    recv_counts: jax.Array
    source_offsets: jax.Array


@flax.struct.dataclass
class DispatchInFlight:
    """A dispatch between its two halves."""

    packed: jax.Array
    token: fabric.Token | None
    handle: DispatchHandle
    num_tokens_per_expert: jax.Array
    wire: WireDtype | None = flax.struct.field(pytree_node=False, default=None)

    def done(self, hide_behind: Any = None) -> tuple[ReceivedRows, DispatchHandle]:
        """Receive the rows, once the tree of arrays `hide_behind` is there."""
        messages, handle = self.packed, self.handle
        if self.token is not None:
            tokens, num_topk = handle.choice_pos.shape
            ep_size, num_local = handle.recv_counts.shape
            capacity = ep_size * max_tokens(tokens, num_topk, num_local)
            buffer = fabric.empty((capacity, messages.shape[1]), messages.dtype)
            messages = fabric.ragged_all_to_all_done(messages, buffer, self.token, hide_behind)
        return ReceivedRows(messages, self.num_tokens_per_expert, self.wire), handle


@flax.struct.dataclass
class CombineInFlight:
    """A combine between its two halves."""

    rows: jax.Array
    token: fabric.Token | None
    handle: DispatchHandle
    topk_weights: jax.Array

    def done(self, hide_behind: Any = None) -> jax.Array:
        """Receive the outputs, once the tree of arrays `hide_behind` is there, and sum them."""
        rows, choice_pos = self.rows, self.handle.choice_pos
        if self.token is not None:
            buffer = fabric.empty((choice_pos.size, rows.shape[1]), rows.dtype)
            rows = fabric.ragged_all_to_all_done(rows, buffer, self.token, hide_behind)
        chosen = jnp.take(rows, jnp.maximum(choice_pos, 0), axis=0)
        # where, not a product with 0: a row that does not exist may hold anything, NaN included.
        chosen = jnp.where(choice_pos[..., None] < 0, 0, chosen).astype(jnp.float32)
        return (chosen * self.topk_weights[..., None]).sum(1)


def _exclusive_cumsum(x: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(x, axis=axis) - x


def pack_choices(slot_idx: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sort the choices by slot: `(token of each packed row [rows], choice_pos, offsets [slots], counts [slots])`."""
    if (num_slots + 1) * slot_idx.size >= 2**31:
        raise ValueError(f"{slot_idx.size} choices over {num_slots} slots overflow the 32-bit sort key")
    tokens, num_topk = slot_idx.shape
    num_rows = tokens * num_topk
    slots = jnp.where(slot_idx < 0, num_slots, slot_idx).reshape(-1)
    # One integer holds slot and choice, so that one cheap single-operand sort orders both.
    keys = lax.sort(slots * num_rows + jnp.arange(num_rows, dtype=jnp.int32))
    order = keys % num_rows
    bounds = jnp.searchsorted(keys // num_rows, jnp.arange(num_slots + 1)).astype(jnp.int32)
    position = jnp.zeros(num_rows, jnp.int32).at[order].set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True)
    choice_pos = jnp.where(slot_idx < 0, -1, position.reshape(tokens, num_topk))
    return order // num_topk, choice_pos, bounds[:-1], bounds[1:] - bounds[:-1]


def packed_rows(
    x: jax.Array, slot_idx: jax.Array, num_ranks: int, num_local: int, wire: WireDtype | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The messages of `x[tokens, hidden]` for the slots `slot_idx[tokens, topk]`, and where they are: see
    `kernels.pack`."""
    is_int8 = wire == "int8"
    x = x if is_int8 else pack_rows(x, wire)
    hidden = x.shape[1]
    scale_at = padded_row(hidden) if is_int8 else -1
    width = scale_at + scale_slot_bytes(hidden) if is_int8 else hidden
    return pack(_pack_form, x, slot_idx, PackSpec(num_ranks, num_local, width, scale_at))


def laid_out(announced: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Where the rows that ranks have announced will lie: see `kernels.lay_out`."""
    return lay_out(_lay_out_form, announced)


def _pack_form(
    x: jax.Array, slot_idx: jax.Array, spec: PackSpec
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    token_of_row, choice_pos, offsets, counts = pack_choices(slot_idx, spec.num_ranks * spec.num_local)
    packed = jnp.take(pack_rows(x, "int8" if spec.scale_at >= 0 else None), token_of_row, axis=0)
    shape = (spec.num_ranks, spec.num_local)
    offsets, counts = offsets.reshape(shape), counts.reshape(shape)
    return packed, choice_pos, offsets, counts, jnp.stack([counts, offsets], axis=1)


def _lay_out_form(announced: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The XLA form of `kernels.lay_out`."""
    counts, source_offsets = announced[:, 0], announced[:, 1]
    totals = counts.sum(0)
    return counts, source_offsets, _exclusive_cumsum(totals) + _exclusive_cumsum(counts), totals


@dataclasses.dataclass(frozen=True, kw_only=True)
class FabricExchange(SplitExchange):
    """The default exchange: counts, then only the rows that exist, over the fabric.

    Attributes:
        axis_name: the mesh axis of the expert-parallel group.
        num_local_experts: slots a rank; slot s lives on rank `s // num_local_experts`.
        dispatch_dtype: what travels to the experts: None as it is, a float dtype, or "int8" (row and scale in one
            message).
        combine_dtype: what travels back: None as it is, or a float dtype.
    """

    axis_name: str
    num_local_experts: int
    dispatch_dtype: WireDtype | None = None
    combine_dtype: WireDtype | None = None

    def __post_init__(self) -> None:
        check_wire_dtype("dispatch_dtype", self.dispatch_dtype, allow_int8=True)
        check_wire_dtype("combine_dtype", self.combine_dtype, allow_int8=False)

    def dispatch_start(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> DispatchInFlight:
        """Exchange the counts and publish the rows; see `dispatch`."""
        ep_size = lax.axis_size(self.axis_name)
        packed, choice_pos, offsets, counts, announced = packed_rows(
            x, slot_idx, ep_size, self.num_local_experts, self.dispatch_dtype
        )
        if ep_size == 1:
            # Packed rows are already grouped by expert on the only rank: there is nothing to exchange.
            handle = DispatchHandle(choice_pos, offsets, counts, offsets, counts, offsets)
            return DispatchInFlight(packed, None, handle, counts[0], self.dispatch_dtype)

        received = fabric.all_to_all(announced, self.axis_name, 0, 0, channel=f"{channel}/counts")
        recv_counts, source_offsets, recv_offsets, num_tokens_per_expert = laid_out(received)
        target_offsets = fabric.all_to_all(recv_offsets, self.axis_name, 0, 0, channel=f"{channel}/offsets")
        handle = DispatchHandle(choice_pos, offsets, counts, recv_offsets, recv_counts, source_offsets)
        token = self._send(packed, (offsets, counts, target_offsets, recv_counts), channel)
        return DispatchInFlight(packed, token, handle, num_tokens_per_expert, self.dispatch_dtype)

    def combine_start(
        self, rows: jax.Array, topk_weights: jax.Array, handle: DispatchHandle, *, channel: str
    ) -> CombineInFlight:
        """Publish the experts' outputs; see `combine`."""
        rows = pack_rows(rows, self.combine_dtype)
        if lax.axis_size(self.axis_name) == 1:
            return CombineInFlight(rows, None, handle, topk_weights)
        index = handle.recv_offsets, handle.recv_counts, handle.source_offsets, handle.send_counts
        return CombineInFlight(rows, self._send(rows, index, channel), handle, topk_weights)

    def _send(self, rows: jax.Array, index: tuple[jax.Array, ...], channel: str) -> fabric.Token:
        flat = (array.reshape(-1) for array in index)
        return fabric.ragged_all_to_all_start(rows, *flat, axis_name=self.axis_name, channel=f"{channel}/rows")


def dispatch(
    x: jax.Array,
    slot_idx: jax.Array,
    *,
    axis_name: str,
    num_local_experts: int,
    dispatch_dtype: WireDtype | None = None,
    channel: str = "dispatch",
) -> tuple[ReceivedRows, DispatchHandle]:
    """Send each token's row to the ranks of its physical experts: `FabricExchange` in one call.

    Args:
        x: `[tokens, hidden]`, this rank's tokens.
        slot_idx: `int32[tokens, topk]`, the slot (physical expert) of each choice, -1 for none. One row travels for
            each choice.
        axis_name, num_local_experts, dispatch_dtype: see `FabricExchange`.
        channel: names the exchange; microbatches without a data dependence between them need different ones.
    """
    exchange = FabricExchange(axis_name=axis_name, num_local_experts=num_local_experts, dispatch_dtype=dispatch_dtype)
    return exchange.dispatch(x, slot_idx, channel=channel)


def combine(
    rows: jax.Array,
    topk_weights: jax.Array,
    handle: DispatchHandle,
    *,
    axis_name: str,
    combine_dtype: WireDtype | None = None,
    channel: str = "combine",
) -> jax.Array:
    """Return `float32[tokens, hidden]`: each token's expert outputs, weighted and summed at its source.

    Args:
        rows: `[receive rows, hidden]`, the experts' outputs, laid out as dispatch delivered them.
        topk_weights: `float32[tokens, topk]`.
        handle: from the dispatch being undone.
        axis_name, combine_dtype, channel: as for `dispatch`.
    """
    num_local_experts = handle.recv_counts.shape[1]
    exchange = FabricExchange(axis_name=axis_name, num_local_experts=num_local_experts, combine_dtype=combine_dtype)
    return exchange.combine(rows, topk_weights, handle, channel=channel)
