"""Loops whose scope says how often they run, `loop_N`: whoever prices a step, traced or compiled, reads it there."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

State = TypeVar("State")  # a tree of arrays


def scan(
    body: Callable[[State, Any], tuple[State, Any]], init: State, xs: Any, *, length: int, unroll: bool = False
) -> tuple[State, Any]:
    """`lax.scan` over `length` steps; a compiler does not always keep their number."""
    with jax.named_scope(f"loop_{length}"):
        return lax.scan(body, init, xs, length=length, unroll=unroll)


def dynamic_loop(
    lower: jax.Array | int,
    upper: jax.Array | int,
    body: Callable[[jax.Array, State], State],
    init: State,
    *,
    expected_trips: int,
) -> State:
    """`lax.fori_loop` from `lower` to `upper` as the data has them, `expected_trips` times as far as anybody knows."""
    with jax.named_scope(f"loop_{expected_trips}"):
        return lax.fori_loop(lower, upper, body, init)
