"""Training: the decoder and its experts in forms that have a derivative, on one device."""

from cmjax.training.decoder import attend_whole
from cmjax.training.experts import block_layout, expert_ffn_blocks, moe_ffn_blocks

__all__ = ["attend_whole", "block_layout", "expert_ffn_blocks", "moe_ffn_blocks"]
