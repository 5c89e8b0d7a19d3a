"""Training: the decoder and its experts in forms that have a derivative, on one device."""

from cmjax.training.decoder import TrainingOutput, attend_whole, cross_entropy, training_pass
from cmjax.training.experts import block_layout, expert_ffn_blocks, moe_ffn_blocks

__all__ = [
    "TrainingOutput",
    "attend_whole",
    "block_layout",
    "cross_entropy",
    "expert_ffn_blocks",
    "moe_ffn_blocks",
    "training_pass",
]
