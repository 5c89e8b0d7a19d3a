"""The KV hand-off from a prefill instance to the ranks of a decode instance (paper section 4.3.3).

With MLA's single latent head every prefill rank holds the same latents, so the source is free to choose; a fixed map
spreads the decode ranks evenly over the prefill ranks. A prompt travels in rounds of some tokens: the prefill side
reads and sends them one after another, and the decode side writes what has arrived between two of its calls. The copies
count as traffic of the RDMA plane, apart from the exchanges of decode.
"""

from cmjax.serve.transfer.cached import CachedBlocks, plan_blocks
from cmjax.serve.transfer.latents import compile_read, compile_write, read, write
from cmjax.serve.transfer.rounds import prefill_tp_rank, round_tokens
from cmjax.serve.transfer.wire import IdleParts, Wire

__all__ = [
    "CachedBlocks",
    "IdleParts",
    "Wire",
    "compile_read",
    "compile_write",
    "plan_blocks",
    "prefill_tp_rank",
    "read",
    "round_tokens",
    "write",
]
