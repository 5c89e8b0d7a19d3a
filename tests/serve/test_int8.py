"""A model in int8: prefill and decode under `fake` and `int8`, on one device and over many, and what travels.

Both modes multiply the same rounded values, and so do one device and many: they differ by the order of float sums.
Where that moves an activation over the edge of a rounding step, it changes by a whole one, and a router's choice may
follow. Hence two bounds on a position's largest error: float rounding for most positions, and a generous one for all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmjax
from cmjax.errors import UserError
from cmjax.mesh import fabric
from cmjax.model import Model, convert_params, params_digest
from cmjax.moe import message_bytes, pack_rows, unpack_int8
from cmjax.quant import QUANT_MODES, linear, quantize
from cmjax.serve import SamplingParams, decode
from tests.helpers import tiny_model
from tests.parity import FOLDER, load_case
from tests.serve.driving import Drive, fill_cache, make_engine, make_requests, step_through

CASE = "v3-ep320"
NUM_PROMPT, LENGTH = 7, 12
# In units of the logits' standard deviation. Measured: a median of 1e-6, a few 1e-4 after a moved rounding, and 0.2
# after another choice of a router.
ROUNDING, LARGEST = 1e-5, 0.5
# Where the two best logits are further apart than this, another order of sums leaves the best token the same.
CLEAR = 0.1


@functools.cache
def sequences():
    """Nine short ones rather than one long: a moved rounding stays in the latents of its sequence."""
    ids = load_case(CASE).input_ids
    return ids[:, : 3 * LENGTH].reshape(-1, LENGTH)


@functools.cache
def logits(ep_size, quant, **settings):
    """Logits at every position: the first tokens by prefill, the others by decode."""
    ids = sequences()
    model = cmjax.load(FOLDER / CASE, quant=quant)
    engine = make_engine(
        model, ep_size, prefill_ep_size=min(ep_size, 32), max_num_seqs_per_rank=-(-len(ids) // ep_size), **settings
    )
    return step_through(engine, ids, NUM_PROMPT)


def errors(found, wanted):
    """The largest error of each position by prefill, and by decode."""
    error = np.abs(found - wanted).max(-1) / wanted.std()
    return error[:, :NUM_PROMPT], error[:, NUM_PROMPT:]


def assert_rounded_alike(found, wanted):
    for part in errors(found, wanted):
        assert np.median(part) < ROUNDING
        assert part.max() < LARGEST
    assert_same_choices(found, wanted)


def assert_same_choices(found, wanted):
    """Greedy tokens, fed the same ones before."""
    second, best = np.sort(wanted, axis=-1)[..., -2:].transpose(2, 0, 1)
    clear = best - second > CLEAR * wanted.std()
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found.argmax(-1)[clear], wanted.argmax(-1)[clear])


# Most of the time is compilation: one way from one device to 320 is enough here, the others go with the long tests.
EP32, FAKE_EP320 = (pytest.param(ep_size, marks=pytest.mark.soak) for ep_size in (32, 320))


@pytest.mark.parametrize("ep_size", [1, EP32, FAKE_EP320])
def test_fake_is_int8_to_rounding(ep_size):
    found, wanted = logits(ep_size, "fake"), logits(ep_size, "int8")
    assert (found != wanted).any()  # they are two computations
    assert_rounded_alike(found, wanted)


@pytest.mark.parametrize("ep_size", [EP32, 320])
def test_many_devices_compute_what_one_does(ep_size):
    """One device packs the same int8 messages and bfloat16 results; at EP320 the shared expert's are among them."""
    alike = {"num_shared_replicas": 1} if ep_size == 320 else {}
    assert_rounded_alike(logits(ep_size, "int8"), logits(1, "int8", **alike))


def test_a_dispatched_shared_expert_is_a_replicated_one():
    """In decode; prefill always replicates here. What travels back is rounded to bfloat16, the only difference."""
    replicated, dispatched = ({"num_shared_replicas": count} for count in (0, 1))
    wide = {"combine_dtype": "float32"}
    assert_rounded_alike(logits(1, "int8", **dispatched, **wide), logits(1, "int8", **replicated, **wide))
    found, wanted = logits(1, "int8", **dispatched), logits(1, "int8")
    _, decoded = errors(found, wanted)
    assert 1e-3 < np.median(decoded) < 3e-2
    assert_same_choices(found, wanted)


def test_int8_is_near_float_and_not_float():
    """A sanity check on random weights; `docs/quantization.md` has what a trained model loses."""
    # Without routers every position is near; with them the typical one is, since some choose otherwise.
    dense = FOLDER / "v3-dense"
    ids = load_case("v3-dense").input_ids
    found = relative(cmjax.load(dense, quant="int8").logits(ids), load_case("v3-dense").logits)
    assert 1e-3 < found.min() < found.max() < 0.1
    assert 1e-3 < np.median(relative(logits(1, "int8"), logits(1, "none"))) < 0.1


def relative(found, wanted):
    """At each position, the norm of the difference over that of `wanted`."""
    return np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def rounded(model):
    params = convert_params(model.params, "int8", np.float32)
    return Model(model.config, params, params_digest(model.config, params))


# What travels


def sent(model, **formats):
    """(rows, bytes) that four steps of decode send to experts and back, those that stay on their rank too."""
    engine = make_engine(model, 8, num_prefill_instances=0, **formats)
    target = engine.decode
    fill_cache(target)
    batch = target.enter(Drive(engine, make_requests(model, [[3], [4], [5]], 5)).skip_prefill(7))
    fabric.traffic.reset()
    output = decode(target.params, target.expert_to_slot, target.cache, batch, spec=target.spec, num_steps=4)
    rows = int(np.asarray(output.slot_load).sum())
    return rows, sum(int(e.num_bytes.sum()) for e in fabric.traffic.snapshot().select("ub", "ragged_all_to_all"))


def test_the_traffic_shows_the_saving():
    """To the byte: a row of 128 values goes there as int8 with a scale, and comes back as bfloat16."""
    model = tiny_model(hidden_size=128, num_hidden_layers=2)
    rows = 3 * 4 * model.config.num_topk
    assert message_bytes(128, np.float32, "int8") == 128 + 8
    for quant, formats, there, back in (
        (None, {}, 512, 512),
        ("int8", {}, 128 + 8, 256),
        ("int8", {"dispatch_dtype": "bfloat16", "combine_dtype": "float32"}, 256, 512),
    ):
        assert sent(rounded(model) if quant else model, **formats) == (rows, rows * (there + back)), formats


# NaN


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", QUANT_MODES)
def test_a_row_that_is_not_finite_stays_so_and_alone(rng, mode, bad):
    """Its int8 values say nothing: the scale carries it, over the wire as well."""
    weight = quantize(rng.normal(size=(10, 24)), mode)
    x = rng.normal(size=(3, 24)).astype(np.float32)
    good = np.asarray(linear(jnp.asarray(x), weight))
    x[1, 5] = bad
    rows = unpack_int8(pack_rows(jnp.asarray(x), "int8"), "int8", 24, jnp.float32)
    for y in (linear(jnp.asarray(x), weight), linear(rows, weight)):
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[::2], good[::2])


def test_nan_activations_are_an_error_that_names_the_prompt():
    """The NaN travels to other ranks' experts beside the rows of prompt 0, which must not be the one named."""
    model = tiny_model(num_hidden_layers=2)
    params = jax.tree.map(np.array, model.params)
    params.embed[9] = np.nan
    engine = make_engine(rounded(Model(model.config, params, "nan")), 4, prefill_ep_size=2)
    with pytest.raises(UserError, match="prompt 1: its logits are not finite"):
        engine.generate([[1, 2, 3], [4, 9]], SamplingParams(max_tokens=3))
