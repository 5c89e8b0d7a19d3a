"""What travels and what is computed in other formats than float32: int8 and bfloat16 rows, bfloat16 models."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.errors import UserError
from cmjax.model import reference
from tests.helpers import tiny_model
from tests.serve.driving import make_engine, step_through

NUM_PROMPT = 14


@functools.cache
def sequences():
    return np.random.default_rng(11).integers(0, 101, (3, 26))


@functools.cache
def exact():
    model = tiny_model()
    return reference.logits(model.config, model.params, sequences())


@functools.cache
def logits(ep_size, dtype="float32", **settings):
    """Logits at every position by prefill and decode, at EP 1 (all on one device) or EP 8."""
    engine = make_engine(
        tiny_model(dtype=jnp.dtype(dtype)),
        ep_size,
        prefill_ep_size=min(ep_size, 4),
        max_num_seqs_per_rank=3 if ep_size == 1 else 1,
        **settings,
    )
    return step_through(engine, sequences(), NUM_PROMPT)


def relative(actual, desired):
    """Frobenius norm of the difference over that of `desired`."""
    return np.linalg.norm(np.asarray(actual, np.float64) - desired) / np.linalg.norm(desired)


def test_int8_dispatch_rounds_the_same_on_one_device_and_over_ranks():
    """One device packs and unpacks the same messages, so both differ from float alike, and from each other hardly."""
    one, eight = (logits(ep_size, dispatch_dtype="int8") for ep_size in (1, 8))
    assert 1e-4 < relative(one, exact()) < 2e-2
    # A rounding that falls the other way changes a value by a whole step: rare, hence the median.
    assert np.median(np.abs(one - eight)) < 2e-6
    assert relative(eight, one) < 2e-3


def test_combine_dtype_bfloat16():
    eight = logits(8, combine_dtype="bfloat16")
    assert 1e-5 < relative(eight, exact()) < 5e-3


def test_a_bfloat16_model_is_near_float32():
    """A token whose router choice flips is far off by right, so the typical error counts."""
    found = logits(8, dtype="bfloat16")
    assert found.dtype == np.float32
    error = np.abs(found - exact()).max(-1)
    assert 1e-4 < np.median(error) < 0.15 * exact().std()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dispatch_dtype", "int4", "dispatch_dtype 'int4' is not one of float32, bfloat16, float16, int8"),
        ("combine_dtype", "int8", "combine_dtype 'int8' is not one of float32, bfloat16, float16"),
    ],
)
def test_unknown_formats_are_errors(field, value, message):
    with pytest.raises(UserError, match=message):
        make_engine(tiny_model(), 2, **{field: value})
