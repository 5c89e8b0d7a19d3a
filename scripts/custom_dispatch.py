"""Replace dispatch and combine with one's own, and see that the tokens stay the same.

    python scripts/custom_dispatch.py
    XLA_FLAGS=--xla_force_host_platform_device_count=16 python scripts/custom_dispatch.py

`GatherExchange` is the simplest correct exchange there is: every rank gathers everybody's tokens and picks the rows of
its own experts; the outputs go back as one sum over the ranks. It moves far more bytes than the default, which the
traffic shows.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import cmjax
from cmjax.mesh import carve, fabric, virtual_devices
from cmjax.moe import ReceivedRows
from cmjax.serve import Engine, EngineSettings, SamplingParams

MODEL = Path(__file__).parents[1] / "tests" / "data" / "parity" / "v3-mtp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherExchange:
    """`cmjax.moe.Exchange` by an all-gather and a psum_scatter."""

    axis_name: str
    num_local_experts: int
    dispatch_dtype: str | None = None
    combine_dtype: str | None = None

    def dispatch(self, x: jax.Array, slot_idx: jax.Array, *, channel: str) -> tuple[ReceivedRows, jax.Array]:
        rows = fabric.all_gather(x, self.axis_name, tiled=True, channel=f"{channel}/rows")
        slots = fabric.all_gather(slot_idx, self.axis_name, tiled=True, channel=f"{channel}/slots").reshape(-1)
        first = lax.axis_index(self.axis_name) * self.num_local_experts
        local = jnp.where((slots >= first) & (slots < first + self.num_local_experts), slots - first, -1)
        order = jnp.argsort(jnp.where(local < 0, self.num_local_experts, local))  # my rows first, by expert
        counts = (local[:, None] == jnp.arange(self.num_local_experts)).sum(0, dtype=jnp.int32)
        return ReceivedRows(rows[order // slot_idx.shape[1]], counts), jnp.where(local[order] < 0, -1, order)

    def combine(self, rows: jax.Array, topk_weights: jax.Array, handle: jax.Array, *, channel: str) -> jax.Array:
        weights = fabric.all_gather(topk_weights, self.axis_name, tiled=True, channel=f"{channel}/weights")
        mine = jnp.where(handle[:, None] < 0, 0, rows.astype(jnp.float32)) * weights.reshape(-1)[handle][:, None]
        tokens = jnp.zeros((weights.shape[0], rows.shape[1])).at[handle // weights.shape[1]].add(mine)
        return fabric.psum_scatter(tokens, self.axis_name, tiled=True, channel=f"{channel}/sum")


def main() -> None:
    model = cmjax.load(MODEL)
    pools = carve(virtual_devices(16), ep_size=8)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (12, 10)).tolist()
    tokens = {}
    for name, exchange in {"default": None, "own": GatherExchange}.items():
        settings = EngineSettings(max_model_len=32, max_num_seqs_per_rank=2)
        if exchange is not None:
            settings = dataclasses.replace(settings, exchange=exchange)
        fabric.traffic.reset()
        result = Engine(model, pools, settings=settings).generate(prompts, SamplingParams(max_tokens=8))
        tokens[name] = [output.token_ids for output in result.outputs]
        wire_bytes = fabric.traffic.snapshot().wire_bytes(plane="ub")
        print(f"{name:8} {wire_bytes:12,} bytes between ranks; first output {tokens[name][0]}")
    if tokens["own"] != tokens["default"]:
        raise SystemExit("the tokens differ")
    print("the tokens are equal")


if __name__ == "__main__":
    main()
