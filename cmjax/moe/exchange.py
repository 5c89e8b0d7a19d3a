"""What an exchange is: how rows reach their experts and come back, whole or in two halves."""

import dataclasses
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp

from cmjax.mesh import fabric
from cmjax.moe.wire import WireDtype, unpack_int8, unpack_rows
from cmjax.quant import QuantizedRows

Result = TypeVar("Result", covariant=True)
Tree = TypeVar("Tree")  # of arrays


@flax.struct.dataclass
class ReceivedRows:
    """A rank's receive buffer: rows grouped by local expert, in expert order, without gaps.

    Attributes:
        messages: `[rows, width]`: only the first `num_tokens_per_expert.sum()` rows exist; the rest is uninitialized.
        num_tokens_per_expert: `int32[local experts]`.
        wire: the format of `messages` (`unpack` undoes it).
    """

    messages: jax.Array
    num_tokens_per_expert: jax.Array
    wire: WireDtype | None = flax.struct.field(pytree_node=False, default=None)

    def unpack(self, messages: jax.Array, hidden: int, dtype: jnp.dtype) -> jax.Array:
        """Turn some of the messages into activations `[rows, hidden]`."""
        return unpack_rows(messages, self.wire, hidden, dtype)

    def unpack_int8(self, messages: jax.Array, hidden: int, dtype: jnp.dtype) -> QuantizedRows:
        """Turn some of the messages into int8 rows `[rows, hidden]`, whose products have `dtype`."""
        return unpack_int8(messages, self.wire, hidden, dtype)


class Exchange(Protocol):
    """How rows reach their experts and come back: what a replacement of dispatch and combine has to offer.

    An exchange is built once for an instance, with the arguments of `FabricExchange`, and called inside `shard_map`; it
    must be hashable, since the compiled step is keyed by it. What `dispatch` gives as handle, `combine` takes.
    """

    def dispatch(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> tuple[ReceivedRows, Any]:
        """Deliver `x[tokens, hidden]` to the slots `slot_idx int32[tokens, topk]` (-1: none), with a handle."""
        ...

    def combine(self, rows: jax.Array, topk_weights: jax.Array, handle: Any, *, channel: str) -> jax.Array:
        """Return the weighted sum of each token's outputs at its source, `float32[tokens, hidden]`."""
        ...


class InFlight(Protocol[Result]):
    """An exchange between its two halves; `fabric.after` takes its `token` (None: there is nothing to wait for)."""

    @property
    def token(self) -> fabric.Token | None: ...

    def done(self, hide_behind: Any = None) -> Result:
        """The second half: what the whole returns, once `hide_behind`, any tree of arrays, is there."""
        ...


def after_start(in_flight: InFlight[Any] | None, x: Tree) -> Tree:
    """`x`, once the exchange has been started: `fabric.after`, where there is anything to wait for."""
    return x if in_flight is None or in_flight.token is None else fabric.after(in_flight.token, x)


@runtime_checkable
class SplitExchange(Exchange, Protocol):
    """An exchange in two halves, which microbatches need: work placed between them hides it.

    The whole forms of a class that inherits it are its two halves in a row.
    """

    def dispatch_start(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> InFlight[tuple[ReceivedRows, Any]]:
        """First half of `dispatch`."""
        ...

    def combine_start(
        self, rows: jax.Array, topk_weights: jax.Array, handle: Any, *, channel: str
    ) -> InFlight[jax.Array]:
        """First half of `combine`."""
        ...

    def dispatch(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> tuple[ReceivedRows, Any]:
        return self.dispatch_start(x, slot_idx, channel=channel).done()

    def combine(self, rows: jax.Array, topk_weights: jax.Array, handle: Any, *, channel: str) -> jax.Array:
        return self.combine_start(rows, topk_weights, handle, channel=channel).done()


@dataclasses.dataclass(frozen=True)
class _Arrived(Generic[Result]):
    """What is over as soon as it has started."""

    result: Result
    token: None = None

    def done(self, hide_behind: Any = None) -> Result:
        del hide_behind
        return self.result


@dataclasses.dataclass(frozen=True)
class WholeExchange(SplitExchange):
    """Halves of any exchange, for those who have nothing to place between them: the first is the whole."""

    exchange: Exchange

    def dispatch_start(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> InFlight[tuple[ReceivedRows, Any]]:
        return _Arrived(self.exchange.dispatch(x, slot_idx, channel=channel))

    def combine_start(
        self, rows: jax.Array, topk_weights: jax.Array, handle: Any, *, channel: str
    ) -> InFlight[jax.Array]:
        return _Arrived(self.exchange.combine(rows, topk_weights, handle, channel=channel))
