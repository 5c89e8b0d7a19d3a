"""XLA's counts beside ours, of one compiled step."""

import dataclasses

import jax.numpy as jnp
import pytest

from cmjax import kernels
from cmjax.perf.layout import Layout
from cmjax.perf.xla import beside, beside_compiled
from cmjax.serve import EngineSettings
from cmjax.targets import StepReport, StepRequest
from cmjax.targets.hlo import xla_counts
from tests.helpers import tiny_config


@pytest.fixture
def xla_form():
    """XLA does not see into kernels."""
    before = kernels.mode()
    kernels.configure("xla")
    yield
    kernels.configure(before)


@pytest.mark.usefixtures("xla_form")
def test_ours_with_every_loop_once_is_what_xla_sees(make_mesh):
    """Of a step whose products are large beside its elementwise arithmetic."""
    config = tiny_config(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, num_attention_heads=8, num_hidden_layers=2,
        max_position_embeddings=4096,
    )  # fmt: skip
    layout = Layout(config=config, phase="decode", ep_size=1, batch=64, context=1000, quant=None)
    instance = dataclasses.replace(layout.instance(), mesh=make_mesh(1), dtype=jnp.dtype(jnp.float32))
    compiled = instance.trace().lower().compile()
    stages = layout.counts()
    found = beside(stages, [layout.expected(layout.tokens)] * len(stages), xla_counts(compiled))
    assert found["xla"] == xla_counts(compiled)
    assert found["expected"]["flops"] > found["once"]["flops"]
    # XLA adds elementwise arithmetic, and the smaller loops (the first chunk, short blocks) that we leave out.
    assert found["xla"]["flops"] == pytest.approx(found["once"]["flops"], rel=0.35)


class Compiled:
    def __init__(self, said):
        self.said = said

    def cost_analysis(self):
        return self.said


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ({"flops": 3, "bytes accessed": 5, "utilization0{}": 1}, {"flops": 3, "memory_bytes": 5}),
        ([{"flops": 3}], {"flops": 3}),
        (None, {}),
        ([], {}),
    ],
)
def test_what_compilers_say(said, counts):
    assert xla_counts(Compiled(said)) == counts


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_compiled_step_has_both_counts(role, make_mesh):
    """Of the request and the report that `cmjax compile` has; the settings are the engine's."""
    settings = {name: getattr(EngineSettings(), name) for name in ("num_redundant_experts", "num_shared_replicas")}
    settings |= {"max_model_len": 256, "max_num_seqs_per_rank": 4, "num_speculative_tokens": 0, "microbatches": 1}
    request = StepRequest("here", role, 2, tiny_config().to_hf(), settings)
    found = beside_compiled(request, StepReport(tokens=256, xla={"flops": 7.0, "memory_bytes": 9.0}))
    layout = Layout(
        config=tiny_config(), phase=role, ep_size=2, batch=4 if role == "decode" else 128, context=256, quant=None
    )
    stages = layout.counts()
    assert found == beside(stages, [layout.expected(layout.tokens)] * len(stages), {"flops": 7.0, "memory_bytes": 9.0})
    assert found["expected"]["flops"] > found["once"]["flops"] > 0
    assert beside_compiled(request, StepReport(status="crashed")) is None
