"""`quant="auto"`: what is measured to be faster in int8 is int8, the rest stays floats, and all of it runs."""

import numpy as np
import pytest

import cmjax
from cmjax.checkpoint import load_checkpoint, restore, save, save_hf, weights
from cmjax.checkpoint.auto_quant import int8_leaves, product_seconds
from cmjax.errors import UserError
from cmjax.model import named_leaves
from cmjax.quant import QuantArray
from tests.parity import FOLDER, load_case
from tests.serve.driving import make_engine, step_through

EXPERTS = {
    f"{stack}.mlp.{part}.{w}" for stack in ("moe", "mtp.layer") for part in ("experts", "shared") for w in ("w13", "w2")
}


def test_what_wins_is_int8():
    """Rows and shapes of every product; experts and their shared ones together, each at its share of the rows."""
    config = load_case("v3-mtp").config
    seen = {}

    def seconds(shape, rows, dtype):
        seen[shape, rows] = dtype
        return (2.0, 1.0) if rows >= 64 else (1.0, 2.0)

    assert int8_leaves(config, "bfloat16", 1, seconds) == set()
    assert {rows for _, rows in seen} == {1}
    every = int8_leaves(config, "bfloat16", 64 * config.num_routed_experts, seconds)
    assert every >= EXPERTS
    assert {name.rsplit(".", 1)[-1] for name in every} == {"q_a", "q_b", "kv_a", "o", "w13", "w2", "eh_proj"}
    assert set(seen.values()) == {np.dtype("bfloat16")}
    # Experts see few of so many rows, and are most of the time.
    mixed = int8_leaves(config, "bfloat16", 64, seconds)
    assert mixed
    assert not mixed & EXPERTS
    heads = config.num_attention_heads
    assert ((heads * config.qk_head_dim, config.q_lora_rank), 64) in seen


def test_the_measurement_is_of_both_forms():
    for rows in (1, 16):
        in_float, in_int8 = product_seconds((32, 24), rows, np.dtype("bfloat16"))
        assert 0 < in_float < 1
        assert 0 < in_int8 < 1


@pytest.fixture
def only(monkeypatch):
    """Lets `auto` find that int8 wins for the leaves that end in any of these names."""

    def choose(*kinds):
        def leaves(config, dtype, rows):
            return {name for name in int8_leaves(config, dtype, rows, lambda *_: (2.0, 1.0)) if name.endswith(kinds)}

        monkeypatch.setattr(weights, "int8_leaves", leaves)

    return choose


@pytest.mark.parametrize(
    "kinds", [pytest.param(("attn.o", "attn.q_b"), marks=pytest.mark.soak), ("w13", "w2", "eh_proj")]
)
def test_a_model_in_both_formats_runs_everywhere(only, kinds, tmp_path):
    only(*kinds)
    case = load_case("v3-mtp")
    model = cmjax.load(case.path, quant="auto")
    assert model.quant == "int8"
    assert model.quantized == {name for name in cmjax.load(case.path, quant="int8").quantized if name.endswith(kinds)}
    ids = case.input_ids[:, :8]
    logits = np.asarray(model.logits(ids))
    assert 1e-5 < np.median(np.abs(logits - case.logits[:, :8])) / case.logits.std() < 0.1
    engine = make_engine(model, 4, prefill_ep_size=2, max_num_seqs_per_rank=len(ids))
    # Rows that travel to int8 experts are rounded on the way, as on one device.
    assert np.median(np.abs(step_through(engine, ids, 5) - logits)) < 1e-4 * logits.std()
    # Kept as it is by either kind of folder.
    assert save(tmp_path / "orbax", model.config, model.params) == model.digest
    save_hf(tmp_path / "hf", model.config, model.params)
    assert restore(tmp_path / "orbax")[2] == model.digest
    again = load_checkpoint(tmp_path / "orbax", quant="auto")
    assert again[2] == model.digest
    stored = load_checkpoint(tmp_path / "hf", quant="auto")[1]
    for name, leaf in named_leaves(model.params).items():
        np.testing.assert_array_equal(named_leaves(stored)[name], leaf, err_msg=name)


def test_nothing_wins(only):
    only("nothing")
    case = load_case("v3-mtp")
    model = cmjax.load(case.path, quant="auto")
    assert (model.quant, model.quantized, model.digest) == (None, frozenset(), cmjax.load(case.path).digest)


def test_int8_that_loses_becomes_floats(only, tmp_path):
    """Also where the checkpoint stores it."""
    case = load_case("v3-mtp")
    config, params, _ = load_checkpoint(case.path, quant="int8")
    save_hf(tmp_path, config, params)
    only("attn.o")
    found = load_checkpoint(tmp_path, quant="auto")[1]
    assert isinstance(found.moe.attn.o, QuantArray)
    wanted = np.asarray(params.moe.attn.q_b.qvalue, np.float32) * np.asarray(params.moe.attn.q_b.scale)[..., None]
    np.testing.assert_array_equal(found.moe.attn.q_b, wanted)


def test_bad_settings():
    with pytest.raises(UserError, match="quant 'int4' is not supported; supported: int8, fake, none, auto"):
        cmjax.load(FOLDER / "v3-mtp", quant="int4")
    with pytest.raises(UserError, match="rows 0 is not positive"):
        cmjax.load(FOLDER / "v3-mtp", quant="auto", rows=0)
