"""Loops whose scope says how often they run, `loop_N`: whoever prices a step, traced or compiled, reads it there."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

# Trees of arrays: what is carried, what a step takes one of, what it gives one of.
State = TypeVar("State")
X = TypeVar("X")
Y = TypeVar("Y")


def scan(
    body: Callable[[State, X], tuple[State, Y]], init: State, xs: X, *, length: int, unroll: bool = False
) -> tuple[State, Y]:
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
