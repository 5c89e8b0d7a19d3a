"""A model in int8: prefill and decode under `fake` and `int8`, on one device and over many, and what travels.

Both modes multiply the same rounded values, so they differ by the order of float sums; that of the two may move an
activation over the edge of a rounding step, which changes it by a whole one. Hence two bounds: the median is at float
rounding, the largest at a few steps.
"""

import functools

import numpy as np
import pytest

import cmjax
from cmjax.mesh import fabric
from cmjax.moe import message_bytes
from tests.helpers import tiny_model
from tests.parity import FOLDER, load_case
from tests.serve.driving import make_engine, step_through

CASE = "v3-ep320"
NUM_PROMPT, LENGTH = 12, 20
# Where the two best logits are further apart than this, another order of sums leaves the best token the same.
CLEAR = 0.1


@functools.cache
def sequences():
    return load_case(CASE).input_ids[:, :LENGTH]


@functools.cache
def logits(ep_size, quant):
    """Logits at every position: the first tokens by prefill, the others by decode."""
    ids = sequences()
    model = cmjax.load(FOLDER / CASE, quant=quant)
    engine = make_engine(
        model, ep_size, prefill_ep_size=min(ep_size, 32), max_num_seqs_per_rank=-(-len(ids) // ep_size)
    )
    return step_through(engine, ids, NUM_PROMPT)


def assert_rounded_alike(found, wanted):
    difference = np.abs(found - wanted)
    scale = np.abs(wanted).mean()
    assert np.median(difference) < 1e-3 * scale
    assert np.mean(difference > 2e-2 * scale) < 0.02
    best, second = np.sort(wanted, axis=-1)[..., ::-1][..., :2].transpose(2, 0, 1)
    clear = best - second > CLEAR * scale
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found.argmax(-1)[clear], wanted.argmax(-1)[clear])


# Most of the time is compilation: EP32 goes with the long tests.
EP32 = pytest.param(32, marks=pytest.mark.soak)


@pytest.mark.parametrize("ep_size", [1, EP32, 320])
def test_fake_is_int8_to_rounding(ep_size):
    assert_rounded_alike(logits(ep_size, "fake"), logits(ep_size, "int8"))


@pytest.mark.parametrize("ep_size", [EP32, 320])
def test_many_devices_compute_what_one_does(ep_size):
    """One device packs the same int8 messages and bfloat16 results."""
    assert_rounded_alike(logits(ep_size, "int8"), logits(1, "int8"))


def test_int8_is_near_float_and_not_float():
    found, wanted = logits(1, "int8"), logits(1, "none")
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.1


def sent(quant):
    """Bytes of `ragged_all_to_all` in a step of decode, those that stay on their device too."""
    model = tiny_model(hidden_size=128)
    engine = make_engine(model if quant == "none" else rounded(model), 8, num_prefill_instances=0)
    fabric.books.reset()
    engine.generate([[1, 2, 3]])
    entries = [e for e in fabric.books.snapshot().entries if e.collective == "ragged_all_to_all"]
    return sum(e.wire_bytes + e.local_bytes for e in entries)


def rounded(model):
    from cmjax.model import Model, convert_params, params_digest

    params = convert_params(model.params, "int8", np.float32)
    return Model(model.config, params, params_digest(model.config, params))


def test_the_books_show_the_saving():
    # A row goes there and comes back: 128 values as float32 both ways, or as int8 with a scale, and as bfloat16.
    there, back = message_bytes(128, np.float32, "int8"), message_bytes(128, np.float32, "bfloat16")
    assert (there, back) == (128 + 8, 256)
    assert sent("int8") / sent("none") == pytest.approx((there + back) / (2 * 512), rel=1e-3)
