"""What is counted of a traced step, against closed formulas; no array is made."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.checkpoint.configs import find_config
from cmjax.model import ModelConfig
from cmjax.perf.layout import Layout
from cmjax.perf.work import STAGES, Work, total
from tests.helpers import tiny_config

R1 = find_config("deepseek-r1").config


def of_step(layout):
    """Stage -> work of the whole step."""
    works = {}
    for stage in layout.counts():
        data = layout.expected(layout.tokens // (2 if stage.lane else 1))
        works.setdefault(stage.stage, []).append(stage.expected(data).times(stage.calls))
    return {name: total(parts) for name, parts in works.items()}


def decode(config, **changes):
    given = {"ep_size": 8, "batch": 6, "context": 1000.0, **changes}
    return Layout(config=config, phase="decode", **given)


def matrix_sizes(c: ModelConfig) -> dict[str, int]:
    """Weights of one layer's matrices, by stage."""
    heads, nope, v, lora = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    queries = c.q_lora_rank * c.hidden_size + heads * c.qk_head_dim * c.q_lora_rank
    return {
        "mla_prolog": queries + c.latent_width * c.hidden_size,
        "absorbed_keys": heads * nope * lora,
        "absorbed_values": heads * v * lora,
        "oproj": c.hidden_size * heads * v,
        "gate": c.num_routed_experts * c.hidden_size,
        "expert": 3 * c.moe_intermediate_size * c.hidden_size,
        "mlp": 3 * c.intermediate_size * c.hidden_size,
    }


def check_decode(layout, passes_layers):
    """Operations of a decode step; `passes_layers`: attention layers that run, the MTP module's included."""
    c, tokens = layout.config, layout.tokens
    sizes, works = matrix_sizes(c), of_step(layout)
    num_moe = passes_layers - len(c.dense_layer_ids)
    int8, bf16 = ("int8", "bf16") if layout.quant else ("bf16", "bf16")

    def flops(stage, precision):
        return getattr(works[stage], precision)

    prolog, keys = (2 * tokens * passes_layers * sizes[name] for name in ("mla_prolog", "absorbed_keys"))
    out, values = (2 * tokens * passes_layers * sizes[name] for name in ("oproj", "absorbed_values"))
    if layout.quant:
        assert flops("mla_prolog", int8) == pytest.approx(prolog)
        assert flops("mla_prolog", bf16) == pytest.approx(keys)
        assert flops("oproj", int8) == pytest.approx(out)
        assert flops("oproj", bf16) == pytest.approx(values)
    else:
        assert flops("mla_prolog", bf16) == pytest.approx(prolog + keys)
        assert flops("oproj", bf16) == pytest.approx(out + values)
    # Scores and mixing, both over the whole latent row, for every query and key.
    core = 2 * 2 * tokens * c.num_attention_heads * layout.context * c.latent_width * passes_layers
    assert flops("core_attention", "bf16") == pytest.approx(core)
    assert flops("gate", "f32") == pytest.approx(2 * tokens * num_moe * sizes["gate"])
    data = layout.expected(tokens)
    assert flops("moe", int8) == pytest.approx(2 * data.rows * sizes["expert"] * num_moe)
    if c.dense_layer_ids:
        assert flops("mlp", int8) == pytest.approx(2 * tokens * sizes["mlp"] * len(c.dense_layer_ids))
    latent_bytes = 2 * layout.batch * layout.context * c.latent_width * passes_layers
    assert works["core_attention"].cache_bytes == pytest.approx(latent_bytes)


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_deepseek_r1_at_ep320(drafts):
    layout = decode(R1, ep_size=320, batch=48, context=4096.0, drafts=drafts)
    if drafts < 2:
        check_decode(layout, R1.num_hidden_layers + drafts)
    works = of_step(layout)
    # One expert a rank: each layer reads it once; every rank has the head, a draft's too.
    moe_layers = len(R1.moe_layer_ids) + drafts
    # The first draft sees all that the last step settled, further ones a token each.
    tokens = 48 * ((1 + drafts) * len(R1.moe_layer_ids) + (1 + drafts if drafts else 0) + max(0, drafts - 1))
    assert works["moe"].weight_bytes == pytest.approx(moe_layers * 3 * 2048 * 7168, rel=1e-3)
    assert works["lm_head"].weight_bytes == pytest.approx((1 + drafts) * 2 * 129280 * 7168)
    # 7.5 KiB a row to the experts, 14 KiB back; a row for each of 8 choices and the shared expert (section 3.4).
    rows = 9 * tokens
    assert sum(e.messages for e in works["dispatch"].exchanges if e.name == "ragged_all_to_all") == rows
    ragged = [e.sent_bytes for e in works["dispatch"].exchanges if e.name == "ragged_all_to_all"]
    assert sum(ragged) == rows * 7680
    assert works["combine"].sent_bytes == rows * 14336


@settings(max_examples=8)  # each is traced
@given(
    heads=st.integers(2, 5),
    batch=st.integers(2, 9),  # one int8 row is padded to two
    experts=st.sampled_from([16, 24, 40]),
    width=st.integers(5, 40),
    layers=st.integers(2, 5),
    context=st.integers(1, 250),
    quant=st.sampled_from([None, "int8"]),
)
def test_small_models_of_any_size(heads, batch, experts, width, layers, context, quant):
    config = tiny_config(
        num_attention_heads=heads, n_routed_experts=experts, moe_intermediate_size=width, num_hidden_layers=layers
    )
    check_decode(decode(config, batch=batch, context=float(context), quant=quant), layers)


def test_two_microbatches_do_the_work_of_one():
    """The same operations, rows and cache; each half reads the weights again."""
    one, two = (of_step(decode(R1, ep_size=320, batch=48, microbatches=count)) for count in (1, 2))
    for name in ("core_attention", "moe", "gate", "dispatch", "combine"):
        assert two[name].flops == pytest.approx(one[name].flops), name
        assert two[name].cache_bytes == pytest.approx(one[name].cache_bytes), name
    assert two["oproj"].weight_bytes > 1.9 * one["oproj"].weight_bytes
    lanes = {stage.lane for stage in decode(R1, batch=48, microbatches=2).counts()}
    assert lanes == {"", "a", "b"}


def test_prefill_of_deepseek_r1():
    layout = Layout(config=R1, phase="prefill", ep_size=32, batch=1024, context=4096)
    works, layers = of_step(layout), R1.num_hidden_layers + 1
    tokens = 1024 * 32  # a group's tokens, of which a rank has 4 of 128 heads
    pairs = 2 * tokens * 2048 * 4 * (192 + 128) * layers
    expanded = 2 * tokens * 512 * 4 * (128 + 128) * layers
    assert works["core_attention"].bf16 == pytest.approx(pairs + expanded)
    gathered = [e for e in works["mla_prolog"].exchanges if e.name == "all_gather"]
    # Latents of queries and of keys go to all other ranks.
    assert sum(e.sent_bytes for e in gathered) == pytest.approx(1024 * 31 * 2 * (1536 + 576) * layers)
    assert {e.plane for e in gathered} == {"ub"}


def test_cached_tokens_are_met_but_not_computed():
    fresh, half = (
        of_step(Layout(config=R1, phase="prefill", ep_size=32, batch=1024, context=4096, cached=cached))
        for cached in (0, 2048)
    )
    assert half["core_attention"].flops > 1.4 * fresh["core_attention"].flops
    assert half["oproj"].flops == fresh["oproj"].flops


def test_attention_that_is_data_parallel_exchanges_nothing():
    whole, own = (
        Layout(config=R1, phase="prefill", ep_size=32, batch=1024, context=4096, attention=kind)
        for kind in ("staged", "dp")
    )
    assert of_step(own)["mla_prolog"].sent_bytes == 0
    assert of_step(own)["oproj"].sent_bytes == 0
    pairs = [of_step(one)["core_attention"].bf16 for one in (whole, own)]
    assert pairs[0] == pytest.approx(pairs[1])  # a 32nd of the heads of 32 times the tokens


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("phase", "batch"), [("decode", 40), ("decode", 200), ("prefill", 4096)])
def test_counts_are_affine_in_the_batch(phase, batch, microbatches):
    layout = Layout(config=R1, phase=phase, ep_size=32, batch=batch, context=100, microbatches=microbatches)
    ends = (16, 64) if phase == "decode" else (2048, 8192)
    data = layout.expected(layout.tokens // microbatches)
    for exact, between in zip(layout.counts(), layout.counts_by_batch(*ends), strict=True):
        for name in ("int8", "bf16", "f32", "weight_bytes", "cache_bytes", "activation_bytes", "operators"):
            expected = getattr(exact.expected(data), name)
            assert getattr(between.expected(data), name) == pytest.approx(expected, rel=1e-3), (exact.stage, name)


def test_every_stage_of_the_paper_is_found_and_nothing_is_made():
    live = len(jax.live_arrays())
    layout = decode(R1, ep_size=320, batch=8, drafts=1)
    found = {stage.stage for stage in layout.counts()}
    assert found <= set(STAGES)
    assert set(STAGES) - found == {"embed", "shared_expert"}  # the shared expert has ranks of its own
    assert len(jax.live_arrays()) == live
    other = total(stage.expected(layout.expected(layout.tokens)) for stage in layout.counts() if stage.stage == "other")
    assert other.flops == 0


def test_work_adds_and_scales():
    one = Work(int8=2, bf16=3, weight_bytes=5)
    assert (one + one).int8 == 4
    assert one.times(2).memory_bytes == 10
    assert dataclasses.replace(one, f32=1).flops == 6
    assert jnp.dtype(jnp.bfloat16).itemsize == 2
