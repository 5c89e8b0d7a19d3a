"""Run a compiled step where its devices are here, on random weights: its times beside what the compiler expects."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmjax.model import PrefillBatch
from cmjax.serve import DecodeState
from cmjax.serve.instances import AbstractInstance


def run_step(instance: AbstractInstance, compiled: Any, num_runs: int) -> dict[str, float]:
    """Seconds of a call, `{"run_first", "run_median"}`; every place and every token of the step is used.

    Args:
        instance: on devices that are here.
        compiled: its step.
        num_runs: calls after the first, at least 1.
    """
    (params, maps, cache, *batch), _ = instance.arguments()
    weights = _random(params, seed=0)
    placement = instance.placement
    slots = np.zeros(maps.shape, np.int32) if placement is None else placement.expert_to_slot
    maps = jax.device_put(slots, maps.sharding)
    latents = _random(cache, seed=1)
    rest = _decode(instance, batch) if instance.role == "decode" else _prefill(instance, batch)
    seconds = []
    for _ in range(num_runs + 1):
        begin = time.perf_counter()
        output = compiled(weights, maps, latents, *rest)
        jax.block_until_ready(output.token_ids)
        seconds.append(time.perf_counter() - begin)
        latents = output.cache  # the old one was given away
    return {"run_first": seconds[0], "run_median": float(np.median(seconds[1:]))}


def _random(tree: Any, seed: int) -> Any:
    """Arrays for a tree of shapes, made on their devices."""
    leaves, structure = jax.tree.flatten(tree)
    made = []
    for number, leaf in enumerate(leaves):
        made.append(_drawing(leaf.shape, leaf.dtype, leaf.sharding)(np.uint32(1 + 1000 * seed + number)))
    return jax.tree.unflatten(structure, made)


@functools.lru_cache(maxsize=64)  # a program for each kind of leaf: trees have many of one kind
def _drawing(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> Callable:
    """A function of a seed. Numbers need only look random, and to compile `jax.random` took most of a small run: each
    element's index is mixed by multiplications and shifts, as hash functions do."""

    def draw(seed: np.uint32) -> jax.Array:
        bits = jnp.full(shape, seed, jnp.uint32)
        for axis in range(len(shape)):
            bits = (bits ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
            bits ^= bits >> 15
        bits = (bits * jnp.uint32(0x85EBCA6B)) ^ (bits >> 13)
        if jnp.issubdtype(dtype, jnp.integer):
            return ((bits >> 8) % 255).astype(jnp.int32).astype(dtype) - jnp.asarray(127, dtype)
        # Uniform around 0, so small that int8 values times their scales stay near 1 over a sum of any width.
        scale = math.sqrt(3 / shape[-1]) if len(shape) > 1 else math.sqrt(3)
        return (((bits >> 8).astype(jnp.float32) * 2.0**-23 - 1) * scale).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def _zeros(tree: Any) -> Any:
    """On their devices, for a tree of shapes."""
    return jax.tree.map(lambda like: jax.device_put(np.zeros(like.shape, like.dtype), like.sharding), tree)


def _filled(like: Any, **fields: np.ndarray) -> Any:
    """Zeros for a dataclass of shapes, on the devices, but for `fields`."""
    given = {}
    for name, values in fields.items():
        shape = getattr(like, name)
        given[name] = jax.device_put(values.astype(shape.dtype), shape.sharding)
    return dataclasses.replace(_zeros(like), **given)


def _decode(instance: AbstractInstance, batch: list[Any]) -> list[Any]:
    """Sequences at the end of their length, each with blocks of its own."""
    settings, (state,) = instance.settings, batch
    assert isinstance(state, DecodeState)
    size, max_blocks = state.batch.block_table.shape
    places = settings.max_num_seqs_per_rank
    per_call = settings.steps_per_call * (1 + settings.num_speculative_tokens)
    position = max(settings.max_model_len - 1 - per_call, 0)
    blocks = np.arange(places * max_blocks).reshape(places, max_blocks) % instance.num_blocks
    rng = np.random.default_rng(0)
    filled = _filled(
        state.batch,
        token_ids=rng.integers(0, instance.config.vocab_size, size),
        positions=np.full(size, position),
        last_positions=np.full(size, settings.max_model_len - 1),
        block_table=np.tile(blocks, (instance.ep_size, 1)),
    )
    settled = state.settled
    if settled is not None:
        places_of = np.tile(np.arange(places), instance.ep_size)
        settled = _filled(settled, places=places_of, counts=np.ones(size))
    sampling, history = _zeros((state.sampling, state.history))
    return [dataclasses.replace(state, batch=filled, settled=settled, sampling=sampling, history=history)]


def _prefill(instance: AbstractInstance, batch: list[Any]) -> list[Any]:
    """Prompts as long as may be, side by side."""
    settings, (packed, sampling, scored) = instance.settings, batch
    assert isinstance(packed, PrefillBatch)
    num_tokens, num_places = len(packed.token_ids), len(packed.block_table)
    length = min(settings.max_model_len, num_tokens, instance.num_blocks * settings.block_size)
    token = np.arange(num_tokens)
    prompt, position = token // length, token % length
    max_blocks = packed.block_table.shape[1]
    table = np.arange(num_places * max_blocks).reshape(num_places, max_blocks) % instance.num_blocks
    slots = table[np.minimum(prompt, num_places - 1), position // settings.block_size] * settings.block_size
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, instance.config.vocab_size, num_tokens)
    filled = _filled(
        packed,
        token_ids=token_ids,
        next_token_ids=np.roll(token_ids, -1),
        positions=position,
        slot_mapping=slots + position % settings.block_size,
        query_start=np.minimum(np.arange(num_places + 1) * length, num_tokens),
        block_table=table,
    )
    return [filled, *_zeros((sampling, scored))]
