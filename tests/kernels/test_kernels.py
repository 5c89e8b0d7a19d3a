"""The kernels against their XLA forms and float64, through the operators that use them."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cmjax import kernels
from cmjax.kernels.native import build
from cmjax.mesh import EP_AXIS, num_cores
from cmjax.model.mla import rms_norm
from cmjax.moe import MlpParams, ReceivedRows, RouterConfig, expert_ffn, laid_out, packed_rows, route_to_slots
from cmjax.quant import LayerMatrix, QuantizedRows, linear, quantize, quantize_rows
from tests.forms import skip_without_kernels
from tests.helpers import TOLERANCES, assert_close

skip_without_kernels()
DTYPES = [jnp.float32, jnp.bfloat16]
SHAPES = [(1, 1, 1), (2, 3, 7), (5, 130, 65), (7, 33, 512), (49, 64, 96), (97, 70, 130), (200, 17, 31), (300, 17, 40)]


def by_xla(function, *arguments):
    """What the XLA forms make of it."""
    before = kernels.mode()
    kernels.configure("xla")
    try:
        return jax.jit(function)(*arguments)
    finally:
        kernels.configure(before)


def compiled(function, *arguments):
    """For such arguments, with the kernels."""
    return jax.jit(function).lower(*arguments).compile()


def in_both(function, *arguments):
    """`(arguments, compiled with the kernels, what the XLA forms make of the arguments)`."""
    return arguments, compiled(function, *arguments), jax.tree.map(np.asarray, by_xla(function, *arguments))


def floats(values, dtype):
    """On the host: each conversion on a device would be a program."""
    return np.asarray(values).astype(np.dtype(dtype))


def wide(array):
    return np.asarray(array, np.float64)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(rng, form, once, dtype, shape):
    """Against float64; and a row's result is the same alone, bit for bit."""
    rows, out, width = shape
    x = floats(rng.normal(size=(rows, width)), dtype)
    weight = floats(rng.normal(size=(3, out, width)) * width**-0.5, dtype)
    matrix = LayerMatrix(weight, np.int32(2))
    of_all, of_one = once(lambda: (compiled(linear, x, matrix), compiled(linear, x[-1:], weight[2])))
    y = np.asarray(of_all(x, matrix))
    assert y.dtype == dtype
    rtol, atol = TOLERANCES[np.dtype(dtype).name]
    np.testing.assert_allclose(wide(y), wide(x) @ wide(weight[2]).T, rtol=rtol, atol=3 * atol)
    alone = of_one(x[-1:], weight[2])
    np.testing.assert_array_equal(np.asarray(alone), y[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_an_int8_product_is_that_of_xla(rng, form, once, dtype, shape, is_quantized):
    rows, out, width = shape
    x = floats(rng.normal(size=(rows, width)), dtype)
    x[0] = 0
    weight = quantize(rng.normal(size=(out, width)).astype(np.float32))

    def make():
        given = QuantizedRows(*jax.jit(quantize_rows)(x), np.dtype(dtype)) if is_quantized else x
        return in_both(linear, given, weight)

    arguments, run, expected = once(make)
    np.testing.assert_array_equal(np.asarray(run(*arguments)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", [False, True])
def test_experts(rng, form, once, dtype, quant):
    """Against the XLA form, which `tests/moe/test_experts.py` holds to a plain loop; rows beyond are not touched."""
    counts = np.array([0, 3, 97, 1, 0, 49, 8], np.int32)
    hidden, ffn, capacity = 37, 66, 170
    w13 = rng.normal(size=(2, len(counts), 2 * ffn, hidden)).astype(np.float32) * hidden**-0.5
    w2 = rng.normal(size=(2, len(counts), hidden, ffn)).astype(np.float32) * ffn**-0.5
    make = quantize if quant else functools.partial(floats, dtype=dtype)
    params = MlpParams(make(w13), make(w2))
    messages = floats(rng.normal(size=(capacity, hidden)), dtype)
    messages[counts.sum() :] = np.nan

    def run(messages, counts, params, layer):
        received = ReceivedRows(messages, counts)
        return expert_ffn(received, params, layer, rows_per_block=8, expected_rows=60, dtype=messages.dtype)

    arguments, program, expected = once(lambda: in_both(run, messages, counts, params, np.int32(1)))
    total = counts.sum()  # what lies behind is whatever the memory held
    y, expected = (wide(np.asarray(rows)[:total]) for rows in (program(*arguments), expected))
    # In bfloat16 a value between the two products may round the other way, and moves an int8 step.
    limit = 1e-6 if dtype == jnp.float32 else 1.5e-2
    assert np.linalg.norm(y - expected) <= limit * np.linalg.norm(expected)
    if quant and dtype == jnp.float32:
        np.testing.assert_array_equal(y, expected)


ROWS = [(1, 1), (3, 7), (5, 64), (40, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_norm(rng, form, once, dtype, weight_dtype, shape):
    x, weight = floats(rng.normal(size=shape), dtype), floats(rng.normal(size=shape[1:]), weight_dtype)
    x[0] = 0
    norm = functools.partial(rms_norm, eps=1e-6)
    programs = once(lambda: [compiled(norm, rows, weight) for rows in (x, x[-1:])])
    y, alone = (np.asarray(run(rows, weight)) for run, rows in zip(programs, (x, x[-1:]), strict=True))
    squares = np.square(wide(x)).mean(1, keepdims=True)
    assert y.dtype == dtype
    rtol, atol = TOLERANCES[np.dtype(dtype).name]
    np.testing.assert_allclose(wide(y), wide(x) / np.sqrt(squares + 1e-6) * wide(weight), rtol=rtol, atol=atol)
    np.testing.assert_array_equal(alone, y[-1:])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", [("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy")])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (24, 3, 6, 2), (24, 6, 24, 3), (96, 8, 8, 4)])
def test_choose(rng, form, once, kind, sizes, has_bias):
    """The very choices of the XLA form, ties included (`tests/moe/test_router.py` holds both to the reference)."""
    (experts, topk, groups, topk_groups), (scoring, topk_method) = sizes, kind
    config = RouterConfig(
        num_experts=experts,
        num_topk=topk,
        num_expert_groups=groups,
        num_topk_groups=topk_groups,
        scoring=scoring,
        topk_method=topk_method,
        norm_topk_prob=has_bias,
        routed_scaling_factor=2.5,
    )
    x = floats(rng.integers(-2, 3, (40, experts)), np.float32)
    x[0] = 0
    bias = floats(rng.integers(-2, 3, experts) / 8, np.float32) if has_bias else None
    slots, is_valid = rng.permutation(experts + 2).astype(np.int32), np.arange(40) % 5 > 0

    def run(x, bias, slots, is_valid):
        return route_to_slots(x, jnp.eye(experts), bias, config, slots, is_valid)

    arguments, program, (expected_idx, expected) = once(lambda: in_both(run, x, bias, slots, is_valid))
    slot_idx, weights = map(np.asarray, program(*arguments))
    np.testing.assert_array_equal(slot_idx, expected_idx)
    np.testing.assert_allclose(weights[is_valid], expected[is_valid], rtol=1e-6)


def test_a_router_of_numbers_that_are_none_still_chooses_experts(rng, form):
    config = RouterConfig(num_experts=8, num_topk=4, num_expert_groups=4, num_topk_groups=2)
    x = floats(rng.choice([np.nan, np.inf, -np.inf, 0], (50, 8)), np.float32)
    arguments = (x, np.ones(50, bool), np.arange(8, dtype=np.int32), None)
    slot_idx, _ = jax.jit(functools.partial(kernels.choose, no_form, spec=config))(*arguments)
    assert all(len(set(row)) == 4 and set(row) <= set(range(8)) for row in slot_idx.tolist())


def no_form(logits, is_valid, expert_to_slot, bias, spec):
    """A form of the right shapes that nobody may run."""
    return jnp.full((logits.shape[0], spec.num_topk), -7, jnp.int32), jnp.zeros((logits.shape[0], spec.num_topk))


@pytest.mark.parametrize("wire", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (7, 3, 5, 2, 33), (64, 8, 1, 24, 96), (9, 2, 40, 1, 16)])
def test_pack(rng, form, once, sizes, dtype, wire):
    """Bit for bit what the XLA form makes, but for the messages that no slot gets."""
    tokens, topk, ranks, local, hidden = sizes
    x = floats(rng.normal(size=(tokens, hidden)), dtype)
    slot_idx = rng.integers(-1, ranks * local, (tokens, topk)).astype(np.int32)

    def run(x, slot_idx):
        return packed_rows(x, slot_idx, ranks, local, wire)

    arguments, program, (expected, *expected_rest) = once(lambda: in_both(run, x, slot_idx))
    packed, *rest = program(*arguments)
    count = int((slot_idx >= 0).sum())
    np.testing.assert_array_equal(np.asarray(packed)[:count], expected[:count])
    for one, other in zip(rest, expected_rest, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(1, 2, 1), (8, 2, 5), (320, 2, 1)])
def test_lay_out(rng, shape):
    announced = jnp.asarray(rng.integers(0, 9, shape), jnp.int32)
    for one, other in zip(jax.jit(laid_out)(announced), by_xla(laid_out, announced), strict=True):
        np.testing.assert_array_equal(one, other)


def test_differentiation_and_vmap_take_the_xla_form(rng):
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 12), (3, 5, 12)))

    def loss(weight):
        return jnp.sum(linear(x, LayerMatrix(weight, jnp.int32(1))) ** 2)

    gradient = jax.jit(jax.grad(loss))(weight)
    np.testing.assert_allclose(gradient[1], 2 * (x @ weight[1].T).T @ x, rtol=1e-4, atol=1e-5)
    assert not gradient[0].any()
    many = jax.vmap(linear, (None, 0))(x, weight)
    np.testing.assert_allclose(many, jnp.einsum("rk,lok->lro", x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check_vma", [False, True])
def test_forms_of_what_varies_by_rank(rng, make_mesh, check_vma):
    """Differentiated, mapped and lowered for others within `shard_map`, which follows what varies."""
    x, weight = rng.normal(size=(8, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    spec = PartitionSpec(EP_AXIS)

    def on_ranks(function):
        return jax.jit(jax.shard_map(function, mesh=make_mesh(4), in_specs=spec, out_specs=spec, check_vma=check_vma))

    def normed(x):
        return rms_norm(x, jnp.asarray(weight), 1e-6)

    whole = jax.grad(lambda x: (normed(x) ** 2).sum())(x)
    assert_close(on_ranks(jax.grad(lambda x: (normed(x) ** 2).sum()))(x), np.asarray(whole))
    assert_close(on_ranks(lambda x: jax.vmap(normed)(x[:, None])[:, 0])(x), np.asarray(normed(x)))
    assert "kernels_norm" not in on_ranks(normed).trace(x).lower(lowering_platforms=("tpu",)).as_text()


def test_other_platforms_lower_the_xla_form():
    x, weight = jax.ShapeDtypeStruct((4, 12), jnp.float32), jax.ShapeDtypeStruct((5, 12), jnp.float32)
    traced = jax.jit(linear).trace(x, weight)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    calls = {platform: "cmjax_kernels_product" in text for platform, text in texts.items()}
    assert calls == {"cpu": True, "tpu": False, "cuda": False}
    assert "dot_general" in texts["tpu"]
    # Whoever counts the operations of a traced step finds them.
    assert "dot_general" in str(traced.jaxpr)


def test_a_form_is_traced_where_somebody_asks_for_it():
    calls = []

    def form(x, weight, spec):
        calls.append(spec)
        return x * weight

    def wrong(x, weight, spec):
        return x[0]

    arguments = np.ones((4, 12), np.float32), np.ones(12, np.float32)
    traced = jax.jit(lambda *values: kernels.norm(form, *values, 0.0)).trace(*arguments)
    traced.lower().compile()
    assert not calls
    assert "mul" in str(traced.jaxpr)
    traced.lower(lowering_platforms=("tpu",))
    assert calls == [0.0]
    with pytest.raises(RuntimeError, match="its operator says"):
        jax.jit(lambda *values: kernels.norm(wrong, *values, 0.0)).trace(*arguments).lower(lowering_platforms=("tpu",))


def test_the_choice_is_visible():
    before = kernels.mode()
    kernels.configure("auto")
    try:
        assert re.match("native (Portable|Avx)", kernels.status("cpu")["product"].form)
        assert kernels.status("tpu")["product"].form == "xla"
        kernels.configure("xla")
        assert kernels.status("cpu")["experts"].reason == "kernels='xla' was asked for"
        assert not kernels.is_native()
    finally:
        kernels.configure(before)
    with pytest.raises(ValueError, match="mode must be one of"):
        kernels.configure("fast")


@pytest.mark.parametrize("rows", [1, 5])
def test_float16_takes_the_xla_form_whatever_its_weights(rng, rows):
    x = jnp.asarray(rng.standard_normal((rows, 33)), jnp.float16)
    weight = quantize(rng.standard_normal((16, 33)).astype(np.float32))
    given = QuantizedRows(*quantize_rows(x), x.dtype)
    for one in (x, given):
        text = jax.jit(linear).lower(one, weight).as_text()
        assert "cmjax_kernels" not in text
        y = jax.jit(linear)(one, weight)
        assert y.dtype == jnp.float16
        assert_close(y, by_xla(linear, one, weight))


def call(name, result, *operands, **attributes):
    """The handler itself, given whatever a test makes up."""
    assert kernels.is_native()  # its library is loaded
    typed = {key: np.int32(value) if isinstance(value, int) else value for key, value in attributes.items()}
    handler = jax.ffi.ffi_call(f"cmjax_kernels_{name}", jax.ShapeDtypeStruct(*result))
    return jax.block_until_ready(jax.jit(lambda *values: handler(*values, is_parallel=False, **typed))(*operands))


def whole(words, positions, history=0, requests=4):
    """Operands of `sample` behind the logits, of requests without drafts."""
    sizes = (requests, words), (positions,), (requests, history), (requests, 0)
    return [np.zeros(size, np.int32) for size in sizes]


SETTINGS = dict.fromkeys(("first", "num_bias", "num_stop", "num_word_tokens", "num_mask_bytes"), 0)
SETTINGS |= {"width": 1, "not_finite": -2, "nothing_allowed": -3}
FAR_BEHIND = {"width": 2, "first": 2**31 - 1}
ZERO = np.zeros((), np.int32)
EXPERTS = [(1, 2, 6, 8), (1, 2, 8, 3)]


@pytest.mark.parametrize(
    ("name", "result", "operands", "attributes"),
    [
        ("product", ((1, 1), np.float32), [(4, 8), ZERO, (1, 16, 8)], {}),  # too small a result
        ("product", ((4, 16), np.float32), [(4, 8), ZERO + 1, (1, 16, 8)], {}),  # no such matrix
        ("product", ((4, 16), np.float32), [(4, 8), ZERO, (1, 16, 9)], {}),  # another width
        ("product", ((4, 16), np.float32), [(4, 8), ZERO, np.zeros((1, 16, 8), np.int8), (1, 3)], {}),  # scales missing
        ("product", ((4, 16), np.float32), [(4, 8), np.zeros(2, np.int32), (1, 16, 8)], {}),  # no index
        (
            "experts",
            ((4, 8), np.float32),
            [(4,), np.ones(2, np.int32), ZERO, *EXPERTS],
            {"scale_at": 0},
        ),
        (
            "experts",
            ((3, 8), np.float32),
            [(4, 8), np.ones(2, np.int32), ZERO, *EXPERTS],
            {"scale_at": 0},
        ),
        (
            "experts",
            ((4, 8), np.float32),
            [(4, 8), np.full(2, 3, np.int32), ZERO, *EXPERTS],
            {"scale_at": 0},
        ),
        (
            "experts",
            ((4, 8), np.float32),
            [np.zeros((4, 12), np.int8), np.ones(2, np.int32), ZERO, *EXPERTS],
            {"scale_at": 9},
        ),
        ("norm", ((4, 8), np.float32), [(4, 8), (7,)], {"eps": np.float32(0)}),
        ("norm", ((4, 8), np.float32), [(4, 8), np.zeros(8, np.int8)], {"eps": np.float32(0)}),
        ("sample", ((4,), np.int32), [(4, 9), *whole(words=12, positions=4)], SETTINGS),  # a word too many
        ("sample", ((4,), np.int32), [(4, 9), *whole(words=11, positions=3)], SETTINGS),
        ("sample", ((3,), np.int32), [(4, 9), *whole(words=11, positions=4)], SETTINGS),
        ("sample", ((4,), np.int32), [(4, 9), *whole(11, 4, history=5, requests=2)], SETTINGS | {"width": 2}),
        ("sample", ((4,), np.int32), [(4, 9), *whole(words=11, positions=4, history=5)], SETTINGS | {"first": 1}),
        ("sample", ((4,), np.int32), [(4, 9), *whole(words=13, positions=4)], SETTINGS | {"num_mask_bytes": 1}),
        (
            "sample",
            ((4,), np.int32),
            [(4, 9), *whole(words=11, positions=4, history=5)],
            SETTINGS | {"first": 2**31 - 1},
        ),
    ],
)
def test_handlers_refuse_what_does_not_fit(name, result, operands, attributes):
    operands = [np.zeros(one, np.float32) if isinstance(one, tuple) else one for one in operands]
    with pytest.raises(jax.errors.JaxRuntimeError, match="cmjax_kernels: "):
        call(name, result, *operands, **attributes)


def test_a_compiler_that_does_not_know_the_newest_cpus_builds_the_other_forms():
    assert {unit.flags[0] for unit in build.units(["Portable"]) if unit.name == "form.cc"} == {"-DCMJAX_FORM=Portable"}
    assert build.units(["Portable"])[0].flags == ("-DCMJAX_WITHOUT_BF16",)
    assert build.units()[0].flags == (() if "Avx512Bf16" in build.FORMS else ("-DCMJAX_WITHOUT_BF16",))


def test_a_wrong_environment_variable_is_named():
    command = [sys.executable, "-c", "import cmjax.kernels"]
    ended = subprocess.run(command, env={"CMJAX_KERNELS": "fast"}, capture_output=True, text=True, check=False)
    assert "CMJAX_KERNELS must be one of auto, native, xla, got 'fast'" in ended.stderr


def test_how_products_are_made(form):
    """What each form says of itself: steps are whole vectors, and sums of eight or sixteen lanes."""
    f32, bf16, s8 = (kernels.tiling(kind) for kind in ("f32", "bf16", "s8"))
    lanes = 16 if form.startswith("Avx512") else 8
    assert f32.step == lanes
    assert f32.is_read_in_place
    assert bf16.is_read_in_place == (form == "Avx512Bf16")
    assert not s8.is_read_in_place
    many = 2**63 - 1 if form == "Portable" else 80 if lanes == 16 else 24
    assert (f32.many_rows, bf16.many_rows) == (many, many)
    assert s8.many_rows == min(many, 24) if form != "Portable" else many
    assert f32.many_tile <= f32.many_block


def test_a_program_whose_kernels_are_not_helped():
    """It says so to each of them; on a machine of one core nobody is there to help."""
    x, weight = np.ones((4, 64), np.float32), np.ones((32, 64), np.float32)
    with kernels.without_help():
        alone = jax.jit(lambda x, weight: linear(x, weight)).lower(x, weight).as_text()
    helped = jax.jit(lambda x, weight: linear(x, weight)).lower(x, weight).as_text()
    assert "is_parallel = false" in alone
    assert f"is_parallel = {'true' if num_cores() > 1 else 'false'}" in helped
