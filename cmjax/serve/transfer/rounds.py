"""How hand-offs are cut: which prefill rank feeds a decode rank, and what travels in one round."""

import numpy as np

from cmjax.schedule import Segments, slot_mapping
from cmjax.serve.settings import EngineSettings
from cmjax.serve.steps.shapes import bucket

# A rank's share of a round: whole short prompts, and no more of a long one than decode can take between two calls.
MAX_ROUND_TOKENS = 256


def prefill_tp_rank(decode_dp_rank: int, prefill_tp_size: int, decode_dp_size: int) -> int:
    """The prefill rank that feeds a decode rank.

    The paper's group mapping where the sizes divide (prefill TP 32, decode DP 320: each prefill rank feeds ten decode
    ranks), and its even extension where they do not.
    """
    return decode_dp_rank * prefill_tp_size // decode_dp_size


def round_tokens(settings: EngineSettings) -> int:
    """Tokens that a decode rank receives in one round."""
    return min(MAX_ROUND_TOKENS, bucket(settings.max_model_len, settings.block_size))


def segment_slots(segments: Segments, block_size: int) -> list[np.ndarray]:
    """The slots of each segment's tokens."""
    found = []
    for start, stop, blocks in zip(segments.starts, segments.stops, segments.blocks, strict=True):
        first = start // block_size * block_size
        found.append(slot_mapping(blocks, np.arange(start - first, stop - first), block_size))
    return found
