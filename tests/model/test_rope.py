"""Rotary embedding against the slow form, plain and YaRN, in both layouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.model import ModelConfig, reference
from cmjax.model.rope import apply_rope, rope_frequencies, rope_tables
from tests.helpers import tiny_config
from tests.parity import CASES, load_case

YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
CONFIGS = {
    "plain": {},
    "half_split": {"rope_interleave": False},
    "yarn": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn_without_mscale": {"rope_scaling": YARN, "rope_theta": 500.0},
}


def rotate(config: ModelConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    cos, sin = rope_tables(config, jnp.asarray(positions))
    return np.asarray(apply_rope(jnp.asarray(x), cos, sin, interleaved=config.rope_interleave))


@pytest.mark.parametrize("name", CASES)
def test_frequencies(name):
    config = load_case(name).config
    expected, scale = reference.rope_frequencies(config)
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-12)
    if config.yarn is not None:
        assert config.yarn.rope_factor == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_of_rotated_queries_and_keys(rng, kind):
    """What attention sees: the products, which do not depend on the order that the rotated dimensions are left in."""
    config = tiny_config(qk_rope_head_dim=12, **CONFIGS[kind])
    q, k = (rng.normal(size=(40, 12)).astype(np.float32) for _ in range(2))
    found = rotate(config, q, np.arange(40)) @ rotate(config, k, np.arange(40)).T
    wide_q, wide_k = (reference.rotate(config, a.astype(np.float64)) for a in (q, k))
    np.testing.assert_allclose(found, wide_q @ wide_k.T, atol=5e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_heads_are_rotated_alike(rng, kind):
    config = tiny_config(qk_rope_head_dim=12, **CONFIGS[kind])
    x = rng.normal(size=(5, 3, 12)).astype(np.float32)
    positions = np.array([0, 7, 7, 100, 3])
    together = rotate(config, x, positions)
    for head in range(3):
        np.testing.assert_allclose(together[:, head], rotate(config, x[:, head], positions), atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(together, axis=-1), np.linalg.norm(x, axis=-1) * reference.rope_frequencies(config)[1], rtol=1e-5
    )


def test_interleaved_and_half_split_are_one_permutation_apart(rng):
    x = rng.normal(size=(6, 12)).astype(np.float32)
    paired = tiny_config(qk_rope_head_dim=12)
    halves = tiny_config(qk_rope_head_dim=12, rope_interleave=False)
    assert paired.rope_interleave
    order = np.concatenate([np.arange(0, 12, 2), np.arange(1, 12, 2)])
    np.testing.assert_array_equal(rotate(paired, x, np.arange(6)), rotate(halves, x[:, order], np.arange(6)))


def test_bfloat16_in_bfloat16_out(rng):
    config = tiny_config(qk_rope_head_dim=12)
    x = jnp.asarray(rng.normal(size=(6, 12)), jnp.bfloat16)
    cos, sin = rope_tables(config, jnp.arange(6) * 1000)
    assert cos.dtype == sin.dtype == jnp.float32
    low = apply_rope(x, cos, sin, interleaved=True)
    high = apply_rope(x.astype(jnp.float32), cos, sin, interleaved=True)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))
