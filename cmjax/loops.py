"""Loops whose trip count the data decides."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

T = TypeVar("T")


def dynamic_loop(
    lower: int | jax.Array, upper: int | jax.Array, body: Callable[[jax.Array, T], T], init: T, *, expected_trips: int
) -> T:
    """`lax.fori_loop` whose scope says how often it is expected to run, for whoever prices the traced step.

    The scope is `loop_N`, N being `expected_trips`; the loop itself runs from `lower` to `upper` as they turn out.
    """
    with jax.named_scope(f"loop_{expected_trips}"):
        return lax.fori_loop(lower, upper, body, init)
