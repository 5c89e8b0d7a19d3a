"""Prefill whose ranks share out heads (SP-TP-SP) against the plain form on one device: prompts of any length, cut
anywhere by ranks, groups, microbatches and chunks."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.model import Model, convert_params, head_shards, params_digest, token_order
from cmjax.serve import Extras, prefill
from tests.helpers import max_error, tiny_config, tiny_model
from tests.serve.driving import chunk_plan, make_engine

BUDGET = 48
BLOCK = 8


class Side:
    """A prefill instance, and the logits and latents that it computes."""

    def __init__(self, model, ep_size, microbatches=1):
        settings = {"max_num_batched_tokens": BUDGET, "block_size": BLOCK, "max_num_seqs_per_rank": 24}
        engine = make_engine(model, 1, prefill_ep_size=ep_size, microbatches=microbatches, **settings)
        (self.source,) = engine.prefill
        self.source.cache = jax.device_put(np.zeros(self.source.cache.shape, np.float32), self.source.spec.by_rank())

    def run(self, chunks):
        """One step: logits of the packed tokens, and the cache of every rank."""
        source = self.source
        batch = source.pack(chunk_plan(source, chunks))
        output = prefill(
            source.params, source.expert_to_slot, source.cache, batch, spec=source.spec, extras=Extras(logits=True)
        )
        source.cache = output.cache
        order = token_order(BUDGET, source.instance.ep_size, source.spec.rank.microbatches)
        num_tokens = sum(stop - start for *_, start, stop in chunks)
        return np.asarray(output.all_logits)[order][:num_tokens], np.asarray(output.cache)


def packed(steps):
    """Chunks of each step, see `chunk_plan`: `steps` holds (prompt, tokens of it) of each; blocks and places in the
    order of first use."""
    prompts = {prompt for step in steps for prompt, _ in step}
    lengths = {one: sum(n for step in steps for prompt, n in step if prompt == one) for one in prompts}
    rng = np.random.default_rng(sum(lengths.values()))
    tokens = {one: rng.integers(0, 101, n).tolist() for one, n in lengths.items()}
    places = {one: index for index, one in enumerate(lengths)}
    free = iter(range(1000))
    blocks = {one: [next(free) for _ in range(-(-n // BLOCK))] for one, n in lengths.items()}
    done = dict.fromkeys(lengths, 0)
    for step in steps:
        chunks = []
        for prompt, count in step:
            chunks.append((places[prompt], tokens[prompt], blocks[prompt], done[prompt], done[prompt] + count))
            done[prompt] += count
        yield chunks


@st.composite
def packings(draw):
    """Up to three steps of a few prompts, some of which go on from the step before."""
    steps = []
    for number in range(draw(st.integers(1, 3))):
        left, step = draw(st.integers(1, BUDGET)), []
        while left and len(step) < 6:
            count = draw(st.integers(1, left))
            name = f"{number - draw(st.integers(0, 1))}/{len(step)}"
            step.append((name, count))
            left -= count
        steps.append(step)
    return steps


CASES = {
    "all ranks in a group": ({"num_attention_heads": 8}, 4, 1),
    "groups of two in two microbatches": ({"num_attention_heads": 6}, 4, 2),
    "no head to share": ({"num_attention_heads": 5}, 3, 1),
    "queries without a latent": ({"num_attention_heads": 4, "q_lora_rank": None}, 6, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case):
    changes, ep_size, microbatches = CASES[case]
    model = tiny_model(num_hidden_layers=2, **changes)
    plain, shared = Side(model, 1), Side(model, ep_size, microbatches)

    @settings(max_examples=12)
    @given(packings())
    def check(steps):
        for chunks in packed(steps):
            (expected, cache), (logits, caches) = plain.run(chunks), shared.run(chunks)
            assert max_error(logits, expected) < 1e-4
            for rank in caches:  # every one has everybody's latents
                assert max_error(rank, cache[0]) < 1e-5

    check()


def test_quantized_heads_keep_their_scales():
    model = tiny_model(num_attention_heads=8, num_hidden_layers=2)
    params = convert_params(model.params, "int8", np.float32)
    quantized = Model(model.config, params, params_digest(model.config, params))
    plain, shared = Side(quantized, 1), Side(quantized, 4)
    for chunks in packed([[("a", 13), ("b", 30)], [("b", 7), ("c", 1)]]):
        assert max_error(shared.run(chunks)[0], plain.run(chunks)[0]) < 2e-3


@pytest.mark.parametrize(("heads", "ranks", "degree"), [(128, 32, 32), (128, 320, 64), (6, 4, 2), (5, 8, 1), (3, 1, 1)])
def test_degree(heads, ranks, degree):
    assert head_shards(tiny_config(num_attention_heads=heads), ranks) == degree


def test_a_rank_scores_its_share_of_the_heads():
    """In the graph: queries of half of the heads for the tokens of two ranks."""
    model = tiny_model(num_attention_heads=6, num_hidden_layers=2)
    source = Side(model, 4).source
    text = str(
        prefill.trace(
            source.params, source.expert_to_slot, source.cache, source.empty_batch(BUDGET), spec=source.spec
        ).jaxpr
    )
    tokens, width = BUDGET // 4, model.config.qk_head_dim
    assert f"f32[{2 * tokens},{3 * width}]" in text
    assert f"f32[{tokens},{6 * width}]" not in text
