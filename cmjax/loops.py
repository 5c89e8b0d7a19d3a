"""Loops whose trip count the data decides."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def dynamic_loop(lower: Any, upper: Any, body: Callable[[Any, Any], Any], init: Any, *, expected_trips: int) -> Any:
    """`lax.fori_loop` whose scope says how often it is expected to run, for whoever prices the traced step.

    The scope is `loop_N`, N being `expected_trips`; the loop itself runs from `lower` to `upper` as they turn out.
    """
    with jax.named_scope(f"loop_{expected_trips}"):
        return lax.fori_loop(lower, upper, body, init)
